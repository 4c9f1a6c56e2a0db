"""The slow loop beside the fast one: a language model, or rules in its place, that proposes bounded actions."""
