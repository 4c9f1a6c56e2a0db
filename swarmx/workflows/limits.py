"""How large anything in a workflow may become; every bound that the room enforces stands here."""

from __future__ import annotations

SOURCE_BYTES = 256 * 1024  # a definition as text
SOURCE_DEPTH = 64  # nesting of a definition's mappings and lists
NODES_DEFINED = 200
NODES_EXPANDED = 2000  # nodes of one run, with every map item and loop iteration counted
RETRIES = 1000  # of one run, all its nodes together
NESTING = 4  # bodies of maps, loops and branches inside one another, as they are written
DEPTH = 8  # bodies inside one another as they run: those of sub-workflows count, and what is inside them
WORKFLOWS = 50  # that a definition brings along
SIGNALS = 50
TEMPLATE_BYTES = 32 * 1024
TEMPLATE_OPERATIONS = 256  # filters and operators in one template
TEMPLATE_DEPTH = 40
TEMPLATE_PARTS = 2000  # names, constants, operators and texts of one template
TEXT_CHARS = 1024 * 1024  # a rendered text, or any value on its way through a template
OUTPUT_CHARS = 4 * 1024 * 1024  # what a node may leave behind
LIST_ITEMS = 10_000
JSON_DEPTH = 64
PATTERN_CHARS = 1000  # a regular expression of a JSON schema
PATTERN_STEPS = 10_000  # of its program
PATTERN_WORK = 200_000_000  # steps times bytes of text, of all matches of one check; seconds where it is worst
IMAGE_BYTES = 32 * 1024 * 1024
