"""Rows for the length head out of the records of finished calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swarmx.core.records import CallRecord
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.forecaster import role_of
from swarmx.neural.head import HeadSpec
from swarmx.neural.heads.length import LengthMemory
from swarmx.neural.replayed import vector_of
from swarmx.neural.table import Table


def length_table(
    records: Sequence[CallRecord], *, spec: HeadSpec, encoder: HashedEncoder, memory: LengthMemory
) -> Table:
    """One row for each finished text call that `encoder` read, oldest first.

    `memory` is that of the start, and is left alone: a copy of it learns from call to call, so that each row has the
    features that its forecast had, or nearly: calls that are not among the records are missing. An answer that was as
    long as the client allowed is censored.
    """
    known = memory.copy()
    rows: list[np.ndarray] = []
    anchors: list[float] = []
    kept: list[CallRecord] = []
    groups: list[str] = []
    for record in records:
        vector = vector_of(record, encoder)
        if vector is None or record.state != "finished" or record.work_done <= 0.0:
            continue
        role = role_of(record)
        features, anchor = known.features(encoder, vector, record.model, role)
        known.learn(encoder, vector, record.model, role, record.work_done)
        rows.append(features)
        anchors.append(anchor)
        kept.append(record)
        groups.append(f"kind{encoder.kind_of(vector)}")
    count = len(kept)
    work = np.array([record.work_done for record in kept], dtype=np.float64)
    limits = np.array([np.inf if record.work_limit is None else record.work_limit for record in kept])
    return Table(
        features=np.array(rows, dtype=np.float32).reshape(count, len(spec.features)),
        anchor=np.array(anchors, dtype=np.float64),
        target=work,
        censored=work >= limits,
        weight=np.ones(count),
        group=np.array(groups, dtype=np.str_),
        split=np.full(count, "train"),  # whoever trains holds rows back itself
    )
