"""The line of stages, from a model to a measured engine. Each stage is one step whose output the store keeps.

A stage names its inputs (the digests of earlier outputs), its part of the recipe, its version and the tools whose
versions change its result; the store makes it or finds it. Raise a stage's version when its code gives another output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.artifacts.cache import Entry, Store, digest_of, key
from builder.artifacts.filesystem import sha256, write_json
from builder.hardware import machine
from builder.planning.plan import Plan
from builder.progress import Console
from builder.recipe import Recipe
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration

CALIBRATION_TOOLS = ("torch", "transformers", "nvidia-modelopt", "safetensors")
ENGINE_TOOLS = ("torch", "transformers", "safetensors", "tensorrt-llm", "tensorrt")


class Line:
    """One build's stages. Each method returns the stage's finished output, making what is missing."""

    def __init__(
        self, recipe: Recipe, plan: Plan, model: Path, store: Store, console: Console, wait: bool = True
    ) -> None:
        self.recipe, self.plan, self.model = recipe, plan, model
        self.store, self.console, self.wait = store, console, wait
        self.model_digest = digest_of(_model_files(model))
        self.entries: dict[str, Entry] = {}
        self.unmeasured = False  # whether speed was asked for, and could not be measured here

    def _run(
        self, stage: str, version: int, inputs: Mapping[str, str], config: Any, tools: tuple[str, ...],
        make: Callable[[Path, Path], None],
    ) -> Entry:  # fmt: skip
        """The stage's output, once a build; says whether it was found or how long it took."""
        if stage in self.entries:
            return self.entries[stage]
        found = machine.versions(*tools)
        described = {"inputs": dict(inputs), "config": config, "version": version, "tools": found}
        self.console.say(f"{stage} ...")
        entry = self.store.run(stage, key(stage, inputs, config, version, found), described, make, wait=self.wait)
        self.console.stage_done()
        state = "kept from an earlier build" if entry.reused else f"{entry.record['seconds']:.1f} s"
        self.console.say(f"{stage}: {state}")
        self.entries[stage] = entry
        return entry

    def calibration(self) -> Entry:
        """tokens.npy [samples, length] int64, and calibration.json with its hash."""
        config = self.recipe.calibration
        if config.data is None:
            raise UserError("calibration.data is not set: name text, for example --set calibration.data=texts.jsonl")

        def make(out: Path, work: Path) -> None:
            import numpy as np

            from calibration.data.windows import calibration_windows

            windows = calibration_windows(config, self.model)
            np.save(out / "tokens.npy", windows.tokens)
            write_json(out / "calibration.json", {"sha256": windows.sha256, **config.model_dump(mode="json")})

        inputs = {"model": self.model_digest, "data": _data_digest(config.data)}
        tools = ("transformers", "datasets")
        entry = self._run("calibration", 1, inputs, config.model_dump(mode="json"), tools, make)
        self._check_text(entry)
        return entry

    def _check_text(self, calibration: Entry) -> None:
        """Warns of calibration text that the dense model finds far less likely than the evaluation text."""
        from calibration.evaluation.text_check import compare_text, words

        accuracy = self.recipe.accuracy
        if accuracy.data is None or "text_check" in self.entries:
            return
        data = accuracy.data

        def make(out: Path, work: Path) -> None:
            from calibration.data.windows import windows

            held_out = windows(data, self.model, accuracy.sequence_length)
            write_json(out / "perplexity.json", compare_text(self.model, _tokens(calibration), held_out.tokens))

        inputs = {"model": self.model_digest, "tokens": calibration.digest, "held_out": _data_digest(data)}
        entry = self._run("text_check", 1, inputs, accuracy.sequence_length, CALIBRATION_TOOLS, make)
        if said := words(json.loads((entry.path / "perplexity.json").read_text())):
            self.console.warn(said)

    def layers(self) -> tuple[list[str], dict[str, str]]:
        """The layers to prune, and the digest of the selection where a budget made one."""
        assert self.recipe.sparsity is not None
        if self.recipe.sparsity.budget is None:
            return self.plan.sparse_layers, {}
        chosen = self.selection()
        return json.loads((chosen.path / "selection.json").read_text())["layers"], {"selection": chosen.digest}

    def selection(self) -> Entry:
        """selection.json: the layers that fit under the budget, and the Pareto front they were chosen from."""
        from builder.engines import measured_tactics
        from builder.pipeline.layer_selection import select

        sparsity, accuracy = self.recipe.sparsity, self.recipe.accuracy
        assert sparsity is not None
        if accuracy.data is None:
            raise UserError("a budget needs text to measure the loss on: set accuracy.data")
        tokens = self.calibration()

        def make(out: Path, work: Path) -> None:
            write_json(out / "selection.json", select(self, _tokens(tokens), work))

        inputs = {
            "model": self.model_digest,
            "tokens": tokens.digest,
            "held_out": _data_digest(accuracy.data),
        }
        config = {
            "sparsity": sparsity.model_dump(mode="json", exclude={"adapter_rank"}),  # it changes no choice
            "accuracy": accuracy.model_dump(mode="json"),
            "quantization": self.recipe.quantization.model_dump(mode="json"),
            "gpu": self.plan.predicted["gpu"],
            "layers": self.plan.sparse_layers,
            **measured_tactics.fingerprint(),
        }
        return self._run("selection", 1, inputs, config, CALIBRATION_TOOLS, make)

    def pruned(self) -> Entry | None:
        """model/: the pruned Hugging Face model, masks folded; layers.json: what became of each layer."""
        sparsity = self.recipe.sparsity
        if sparsity is None:
            return None
        from calibration.pruning import sparsify

        tokens, (layers, chosen) = self.calibration(), self.layers()

        def make(out: Path, work: Path) -> None:
            target = Declaration(tuple(layers))
            reports = sparsify.sparsify(
                self.model, _tokens(tokens), sparsity, target, out / "model", work, self.console.progress
            )
            write_json(out / "layers.json", [vars(report) for report in reports])

        inputs = {"model": self.model_digest, "tokens": tokens.digest, **chosen}
        config = {"method": sparsity.method, "pattern": sparsity.pattern, "layers": layers}
        return self._run("sparsify", sparsify.VERSION, inputs, config, CALIBRATION_TOOLS, make)

    def recovered(self) -> Entry | None:
        """model/: the pruned model after distillation from the dense one, where the recipe asks for it."""
        pruned, recovery = self.pruned(), self.recipe.recovery
        if pruned is None or recovery is None:
            return pruned
        text = recovery.data or self.recipe.calibration.data
        if text is None:
            raise UserError("recovery needs text: set recovery.data or calibration.data")
        calibration, quantization = self.recipe.calibration, self.recipe.quantization
        quantized = self.plan.quantized_layers if quantization.wanted else []

        def make(out: Path, work: Path) -> None:
            from calibration.data.windows import windows
            from calibration.recovery.recover import recover

            tokens = windows(
                text, self.model, calibration.sequence_length, chat_template=calibration.chat_template
            ).tokens  # all there are: recovery is held back by too little text first
            recover(
                self.model, pruned.path / "model", tokens, recovery, out / "model", work, self.console.progress,
                quantization, quantized,
            )  # fmt: skip

        inputs = {"model": self.model_digest, "pruned": pruned.digest, "text": _data_digest(text)}
        config = {
            "recovery": recovery.model_dump(mode="json"),
            "calibration": calibration.model_dump(mode="json"),
            "quantization": quantization.model_dump(mode="json"),
            "quantized": quantized,
        }
        return self._run("recover", 3, inputs, config, CALIBRATION_TOOLS, make)

    def adapter(self) -> Entry | None:
        """adapter/: a LoRA adapter to the pruned weights, where the recipe asks for one; layers.json: what it gives."""
        sparsity = self.recipe.sparsity
        if sparsity is None or sparsity.adapter_rank is None:
            return None
        from calibration.lora import eora

        weights, tokens, rank = self.recovered(), self.calibration(), sparsity.adapter_rank
        assert weights is not None

        def make(out: Path, work: Path) -> None:
            reports = eora.compensate(
                self.model, weights.path / "model", _tokens(tokens), rank, out / "adapter", work, self.console.progress
            )
            write_json(out / "layers.json", [vars(report) for report in reports])

        inputs = {"model": self.model_digest, "weights": weights.digest, "tokens": tokens.digest}
        return self._run("adapter", eora.VERSION, inputs, {"rank": rank}, CALIBRATION_TOOLS, make)

    def checkpoint(self) -> Entry:
        """hf/, and trtllm/ for the tensorrt backend: quantized, written by ModelOpt and verified on the files."""
        from builder.pipeline.checkpoint_stage import write_checkpoints

        weights = self.recovered()
        source = weights.path / "model" if weights else self.model
        quantization, engine = self.recipe.quantization, self.recipe.engine
        tokens = self.calibration() if quantization.wanted else None
        quantized = self.plan.quantized_layers
        trtllm = (engine.tensor_parallel, engine.pipeline_parallel) if self.plan.backend == "tensorrt" else None

        def make(out: Path, work: Path) -> None:
            write_checkpoints(
                source, quantization, quantized, _tokens(tokens) if tokens else None, out, trtllm,
                self.console.progress,
            )  # fmt: skip

        inputs = {"weights": weights.digest if weights else self.model_digest}
        inputs |= {"tokens": tokens.digest} if tokens else {}
        config = {"quantization": quantization.model_dump(mode="json"), "layers": quantized, "trtllm": trtllm}
        return self._run("checkpoint", 1, inputs, config, CALIBRATION_TOOLS, make)

    def engine(self) -> Entry:
        """The backend's engine directory."""
        return self._engine("engine", self.plan.backend)

    def opened(self) -> Entry:
        """The engine, where this process can open it; else a torch engine of the same checkpoint.

        Only TensorRT-LLM's own server opens an engine of its backends.
        """
        return self.engine() if self.plan.backend == "torch" else self._engine("reference", "torch")

    def _engine(self, stage: str, backend: str) -> Entry:
        from builder.engines import measured_tactics, registry

        checkpoint, config = self.checkpoint(), self.recipe.engine
        served = stage == "engine"  # the other is asked for its logits alone

        def make(out: Path, work: Path) -> None:
            gpu = self.plan.predicted["gpu"]
            registry.build(backend, checkpoint.path, out, config, gpu, speed_matters=served)

        described = {
            **config.model_dump(mode="json"),
            "backend": backend,
            "predicted": self.plan.predicted["gpu"],
            "sm": machine.sm(),
            **(measured_tactics.fingerprint() if served else {}),
        }
        return self._run(stage, 2, {"checkpoint": checkpoint.digest}, described, ENGINE_TOOLS, make)

    def accuracy(self) -> Entry | None:
        """accuracy.json: the engine against the dense model on held-out text; None where the recipe names no text."""
        config = self.recipe.accuracy
        if config.data is None:
            return None
        engine = self.opened()

        def make(out: Path, work: Path) -> None:
            from builder.pipeline.measure import accuracy

            write_json(out / "accuracy.json", accuracy(self.model, engine.path, config, self.console.progress))

        inputs = {"model": self.model_digest, "engine": engine.digest, "data": _data_digest(config.data)}
        return self._run("evaluate", 2, inputs, config.model_dump(mode="json"), ENGINE_TOOLS, make)

    def performance(self) -> Entry | None:
        """performance.json and records.jsonl: dense and built, interleaved on this machine.

        None where the recipe asks for none, or only TensorRT-LLM's server opens the engine.
        """
        config = self.recipe.benchmark
        if config is None:
            return None
        if self.plan.backend != "torch":
            self.unmeasured = True
            return None
        engine = self.engine()

        def make(out: Path, work: Path) -> None:
            from builder.pipeline.measure import performance

            performance(self.model, engine.path, config, out, self.console.progress)

        inputs = {"model": self.model_digest, "engine": engine.digest}
        described = {"benchmark": config.model_dump(mode="json"), "device": machine.device()}
        return self._run("benchmark", 2, inputs, described, ENGINE_TOOLS, make)


def _model_files(model: Path) -> dict[str, str]:
    """sha256 of the files that make a model: weights, config, tokenizer; not the texts that may lie beside them."""
    kept = [
        path for path in sorted(model.iterdir()) if path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja")
    ]
    return {path.name: sha256(path) for path in kept if path.is_file()}


def _data_digest(data: str) -> str:
    """Of a local file its content; of a dataset id its name."""
    path = Path(data)
    return sha256(path) if path.is_file() else digest_of({"dataset": data})


def _tokens(entry: Entry) -> Any:
    import numpy as np

    return np.load(entry.path / "tokens.npy")
