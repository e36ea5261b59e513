"""The CPU layer: what it rewrites is still there, and nobody else notices it."""

import importlib
import subprocess
import sys

import longspan.trainer.engine  # noqa: F401  installs the hooks
import pytest
import torch
from longspan.trainer.engine import hooks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer is not in use")


def constants_and_names(code):
    for value in code.co_consts:
        if hasattr(value, "co_consts"):
            yield from constants_and_names(value)
        elif isinstance(value, tuple):
            yield from value
        else:
            yield value
    yield from (f"name:{name}" for name in code.co_names)


def original(name):
    """A megatron module's own byte code."""
    loader = importlib.util.find_spec(name).loader
    return super(type(loader), loader).get_code(name)


@pytest.mark.parametrize("name", hooks.CUDA_TYPE_MODULES)
def test_the_type_names_that_are_rewritten_still_occur(name):
    assert "torch.cuda.FloatTensor" in set(constants_and_names(original(name)))


@pytest.mark.parametrize("name", hooks.CUDA_METHOD_MODULES)
def test_the_methods_that_are_rewritten_still_occur(name):
    assert "name:cuda" in set(constants_and_names(original(name)))


@pytest.mark.parametrize("name", hooks.CPU_PATCHES)
def test_every_patched_module_still_exists(name):
    assert importlib.import_module(name).__name__ == name


def test_a_moved_symbol_is_an_error():
    with pytest.raises(ImportError, match="no longer has missing_name"):
        hooks.require(hooks, "missing_name")


def test_torch_itself_is_untouched():
    # Only what the view replaces: importing dynamo wraps torch.manual_seed, for one.
    code = (
        "import torch; before = dict(vars(torch)); cuda = dict(vars(torch.cuda));"
        "import longspan.trainer.engine.model;"
        "from longspan.trainer.engine.cpu_torch import _FACTORIES as names;"
        "changed = [k for k in (*names, 'device') if vars(torch).get(k) is not before[k]];"
        "changed += [k for k in cuda if vars(torch.cuda).get(k) is not cuda[k]];"
        "print(changed)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.stdout.strip() == b"[]", done.stderr.decode()


def test_the_byte_code_on_disk_stays_megatrons():
    """Another program must not find our rewritten code in megatron's cache."""
    importlib.import_module("megatron.core.optimizer.clip_grads")
    code = (
        "import importlib.util as u, importlib.machinery as m;"
        "spec = u.find_spec('megatron.core.optimizer.clip_grads');"
        "print('torch.cuda.FloatTensor' in repr([c.co_consts for c in"
        " spec.loader.get_code(spec.name).co_consts if hasattr(c, 'co_consts')]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.stdout.strip().endswith(b"True"), done.stderr.decode()


def test_megatron_imported_too_early_is_an_error():
    code = "import megatron.core; import longspan.trainer.engine"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert b"imported before longspan's CPU layer" in done.stderr
