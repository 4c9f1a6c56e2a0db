"""Encoders by name: what turns a prompt into a vector, from microseconds to tens of milliseconds."""

from __future__ import annotations

from pathlib import Path

from swarmx.core.errors import ConfigError, PredictorError
from swarmx.core.ports import Encoder
from swarmx.core.words import near

ENCODERS = ("hashed", "sentence", "isomorphic")


def make_encoder(name: str, weights: Path | None = None) -> Encoder:
    """The encoder of this name, with its weights from the folder `weights`; `sentence` brings its own.

    Raises ConfigError for an unknown name, PredictorError when weights or libraries are missing or damaged.
    """
    if name not in ENCODERS:
        raise ConfigError(f"the encoder {name!r} is unknown.{near(name, ENCODERS)} There are {', '.join(ENCODERS)}.")
    if name == "sentence":
        from swarmx.neural.encoders.sentence import SentenceEncoder

        return SentenceEncoder()
    if weights is None:
        raise PredictorError(f"the encoder {name!r} needs weights: give the folder that `swarmx train` wrote.")
    if name == "isomorphic":
        from swarmx.neural.encoders.isomorphic import IsomorphicEncoder

        return IsomorphicEncoder.load(weights)
    from swarmx.neural.encoders.hashed import load_hashed

    return load_hashed(weights)
