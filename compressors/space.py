"""What a search may choose: layers, widths, ranks, the bits of every group of layers, and the artifact's precision.

Unstructured zeros are not in it: they make no dense artifact smaller or faster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asr_core.dims import Dims
from compressors.methods.distil import kept

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SIDES = ("encoder", "decoder")
PACKED = "int4"  # the precision whose artifacts keep every weight's own codes; in the others, few bits make nothing smaller
BITS = (8, 4)
GROUP = 32  # weights that share a scale at 4 bits
WIDTHS = (0.0, 0.25, 0.5)  # share of the feed-forward channels that goes
RANKS = (1.0, 0.5, 0.25)  # share of the full rank that stays; 1 leaves the weights whole
MOST_GROUPS = 4  # of layers of a side that have their bits in common
DEPTHS = (1.0, 0.75, 0.5)  # share of the decoder's layers that stays

Step = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One point of the search: the steps of its recipe, and the precision that its artifact is exported with."""

    precision: str
    steps: list[Step]

    @property
    def key(self) -> str:
        """A name of its own."""
        content = json.dumps([self.precision, self.steps], sort_keys=True)
        return f"{self.precision}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def __str__(self) -> str:
        told = [f"{name} {_told(name, given)}" for step in self.steps for name, given in step.items()]
        return f"{self.precision}: {', then '.join(told) or 'the source as it is'}"


@dataclass(frozen=True)
class Space:
    """The choices for a model of some size and a target's precisions; ``repair`` steps of fine-tuning end every cut."""

    dims: Dims
    precisions: Sequence[str]
    repair: int = 0

    def choices(self, precision: str) -> dict[str, list[Any]]:
        """Every parameter of the search at a precision, and what it may be."""
        layers = self.dims.decoder_layers
        depths = sorted({max(1, round(share * layers)) for share in DEPTHS}, reverse=True)
        cuts: dict[str, list[Any]] = {"decoder_layers": depths, "ffn": list(WIDTHS), "rank": list(RANKS)}
        if precision != PACKED:
            return cuts
        names = [f"{side}_bits_{i}" for side in SIDES for i in range(self._groups(side))]
        return cuts | {name: list(BITS) for name in [*names, "embedding_bits"]}

    def plain(self, precision: str) -> dict[str, Any]:
        """The choices that cut nothing, with 8 bits where there is a choice."""
        return {name: options[0] for name, options in self.choices(precision).items()} | {"precision": precision}

    def starts(self, precision: str) -> list[dict[str, Any]]:
        """What is tried before anything else: nothing cut, with the most bits and with the fewest."""
        most = self.plain(precision)
        fewest = most | {name: options[-1] for name, options in self.choices(precision).items() if "bits" in name}
        return [most] if fewest == most else [most, fewest]

    def suggest(self, trial: BaseTrial) -> Candidate:
        """What an optimiser's trial chooses."""
        precision = trial.suggest_categorical("precision", list(self.precisions))
        chosen = {name: trial.suggest_categorical(name, options) for name, options in self.choices(precision).items()}
        return self.candidate(chosen | {"precision": precision})

    def candidate(self, chosen: Mapping[str, Any]) -> Candidate:
        """The recipe of some choices, in the order in which the methods work on each other's results."""
        steps: list[Step] = []
        layers = self.dims.decoder_layers
        if chosen["decoder_layers"] < layers:
            staying = kept(layers, chosen["decoder_layers"], "even")
            steps.append({"layers": {"decoder": [i for i in range(layers) if i not in staying]}})
        if chosen["ffn"]:
            steps.append({"ffn": {"share": chosen["ffn"]}})
        if chosen["rank"] < 1:
            steps.append({"lowrank": {"share": chosen["rank"]}})
        if steps and self.repair:
            steps.append({"finetune": {"steps": self.repair}})
        return Candidate(chosen["precision"], steps + (self._rounding(chosen) if chosen["precision"] == PACKED else []))

    def _rounding(self, chosen: Mapping[str, Any]) -> list[Step]:
        counts = {"encoder": self.dims.encoder_layers, "decoder": chosen["decoder_layers"]}
        steps = []
        for bits in BITS:
            only = [
                f"model.{side}.layers.{i}.*"
                for side in SIDES
                for i in range(counts[side])
                if chosen[f"{side}_bits_{i * self._groups(side) // counts[side]}"] == bits
            ]
            embedding = chosen["embedding_bits"] == bits
            if not only and not embedding:
                continue
            given: dict[str, Any] = {"bits": bits, "body": bool(only), "embedding": embedding}
            given |= {"only": only} if only else {}
            steps.append({"quantise": given | ({"group": GROUP} if bits < BITS[0] else {})})
        return steps

    def _groups(self, side: str) -> int:
        return int(min(MOST_GROUPS, getattr(self.dims, f"{side}_layers")))


def _told(name: str, given: Mapping[str, Any]) -> str:
    if name != "quantise":
        return " ".join(f"{key}={value}" for key, value in given.items())
    layers = [pattern.removeprefix("model.").removesuffix(".*").replace(".layers.", " ") for pattern in given.get("only", [])]
    return f"to {given['bits']} bits {', '.join(layers + ['embedding'] * given['embedding'])}"
