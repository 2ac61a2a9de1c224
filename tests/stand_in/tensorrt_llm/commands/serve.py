"""STAND-IN: trtllm-serve, with this release's options. It serves nothing: it prints its arguments as JSON.

On main it is a group whose default command this is; its console script calls `main` in every release (setup.py).
"""

import json

import click

from tensorrt_llm._release import RELEASE
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
from tests.support.contract import facts


def options():
    backends = []
    for name, fact in facts("trtllm-serve", RELEASE).items():
        flag, _, choice = name.partition(" ")
        if choice:
            backends.append(choice)
        else:
            yield click.Option([flag], is_flag=fact.get("switch", False))
    yield click.Option(["--backend"], type=click.Choice(backends), default="pytorch")


def serve(**given):
    cls = MODEL_CLASS_MAPPING["LlamaForCausalLM"]
    asked = {name: value for name, value in given.items() if value}
    click.echo(json.dumps({"release": RELEASE, "class": f"{cls.__module__}.{cls.__qualname__}", **asked}))


main = click.Command("trtllm-serve", params=[click.Argument(["model"]), *options()], callback=serve)
