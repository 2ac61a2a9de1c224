"""The router of a deployment: features, predictor and threshold, as files that serving reads with numpy alone.

router.json    build_id, variants, budget, threshold
router.npz     tables of the features, weights of the predictor, histograms of the training prompts' features;
               components of the next token's distribution, where the router reads the prefill
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from calibration.routing.divergence import COMPARISONS, LogProbabilities
from calibration.routing.features import NAMES, Features
from calibration.routing.predictor import Prediction, Predictor
from calibration.routing.prefill import COMPONENTS, Prefill, RunPrefill
from plugins.common.errors import UserError
from plugins.common.files import replacing
from plugins.common.json_files import read_json_object, write_json

BINS = 10
FACTS = "router.json"
ARRAYS = "router.npz"


@dataclass(frozen=True)
class Router:
    """Serves a prompt on `variants[1]`, the cheap engine, where its predicted loss is at most `threshold`.

    build_id: sha256 of the engines that it was trained on, and of what it reads
    budget_kl: mean loss over all requests that the deployment may cost, nats per token
    threshold: predicted loss, nats per token; below 0 no prompt goes to the cheap engine
    edges, reference_FB: inner edges [F, B - 1] of the bins of each feature, and the training prompts' share in each bin
    prompts: how many the router was trained on
    seen: the ratio of what a shadow run measures to the training prompts' loss, for each of COMPARISONS
    prefill: features of the cheap engine's prefill of the prompt; None: the prompt alone decides
    """

    features: Features
    predictor: Predictor
    build_id: str
    variants: tuple[str, ...]
    budget_kl: float
    threshold: float
    edges: NDArray[np.float32]
    reference_FB: NDArray[np.float32]
    prompts: int
    seen: Mapping[str, float]
    prefill: Prefill | None = None

    def extract(self, token_ids: Any, run_prefill: RunPrefill) -> NDArray[np.float32]:
        """The features [F] of a prompt. `run_prefill` is called by a router that reads the prefill.

        Raises UserError for an empty prompt and for ids beyond the vocabulary, before the prefill.
        """
        features_F = self.features.extract(token_ids)
        if self.prefill is None:
            return features_F
        return np.concatenate([features_F, self.prefill.extract(run_prefill())])

    def predict(self, token_ids: Any, next_token: LogProbabilities | None = None) -> Prediction:
        """The prediction for a prompt and what its prefill gave. Raises as `extract`.

        A router that reads the prefill predicts an infinite loss without one.
        """
        return self.predictor.predict(self.extract(token_ids, lambda: next_token))

    def save(self, directory: Path) -> None:
        """Writes both files, each at once."""
        directory.mkdir(parents=True, exist_ok=True)
        own = {"edges": self.edges, "reference_FB": self.reference_FB}
        with replacing(directory / ARRAYS) as partial:
            prefill = self.prefill.arrays() if self.prefill else {}
            np.savez(partial, **self.features.arrays(), **self.predictor.arrays(), **prefill, **own)
        names = ("build_id", "variants", "budget_kl", "threshold", "prompts", "seen")
        write_json(directory / FACTS, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, directory: Path, build_id: str | None = None) -> Router:
        """Reads a router. Raises UserError where there is none, a damaged one, or that of another build."""
        try:
            facts = read_json_object(directory / FACTS, "build again")
            with np.load(directory / ARRAYS, allow_pickle=False) as stored:
                arrays = dict(stored)
            router = cls(
                Features.from_arrays(arrays),
                Predictor.from_arrays(arrays),
                str(facts["build_id"]),
                tuple(facts["variants"]),
                float(facts["budget_kl"]),
                float(facts["threshold"]),
                arrays["edges"],
                arrays["reference_FB"],
                int(facts["prompts"]),
                {name: float(facts["seen"][name]) for name in COMPARISONS},
                Prefill.from_arrays(arrays),
            )
            if not all(0 < share < math.inf for share in router.seen.values()):
                raise ValueError(f"shares of the loss {facts['seen']}")
            if router.prompts < 1 or len(router.variants) < 2:
                raise ValueError(f"{router.prompts} prompts, {len(router.variants)} variants")
            components = router.prefill and router.prefill.components_VD.shape
            if components and components != (len(router.features.surprisal_V), COMPONENTS):
                raise ValueError(f"components {components}")
            features = len(NAMES) + (COMPONENTS if router.prefill else 0)
            if router.reference_FB.shape != (features, BINS) or router.edges.shape != (features, BINS - 1):
                raise ValueError(f"histograms {router.reference_FB.shape}, edges {router.edges.shape}")
        except FileNotFoundError:
            raise UserError(f"'{directory}' holds no router", "build with a 'routing' section in the recipe") from None
        except (KeyError, ValueError, TypeError, OSError, EOFError, BadZipFile) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the router in '{directory}' cannot be read ({reason})", "build again") from None
        if build_id is not None and router.build_id != build_id:
            raise UserError(
                f"the router in '{directory}' is that of build {router.build_id[:12]}, not of {build_id[:12]}",
                "build again",
            )
        return router


def histograms(features_NF: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Edges [F, BINS - 1] at the deciles of each feature, and the share of the prompts in each bin [F, BINS]."""
    quantiles = np.linspace(0, 1, BINS + 1)[1:-1]
    edges = np.quantile(features_NF, quantiles, axis=0).T.astype(np.float32)
    return edges, bin_shares(features_NF, edges)


def bin_shares(features_NF: NDArray[Any], edges: NDArray[np.float32]) -> NDArray[np.float32]:
    """The share of N prompts in each bin of each feature [F, BINS]."""
    rows = [
        np.bincount(np.searchsorted(edges, column, side="right"), minlength=BINS)
        for edges, column in zip(edges, features_NF.T, strict=True)
    ]
    return (np.array(rows) / len(features_NF)).astype(np.float32)
