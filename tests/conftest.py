"What the tests share: one thread, no network, a small untrained pipeline, and ways to run the command line"
import os, subprocess, sys, tempfile
from pathlib import Path

# before torch is imported, and for every process that a test starts
os.environ.update(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
os.environ.setdefault('SFV_LITE_CACHE', tempfile.mkdtemp()) # the user's own stays as it is

import pytest, torch
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
TINY = dict(clips=32, batch=4, teacher_batch=4, steps=6, teacher_steps=6, head_start=0, warmup=0, teacher_warmup=0,
    schedule='constant', accumulation=1, log_every=1, save_every=1000, sample_every=1000, validate_every=1000,
    validate_clips=4, precision='no', tracker='none', T_g=4, lam=.1)


def begin(folder, verb, recipe):
    "What a run writes first"
    import dataclasses, json
    from sfv_lite.files import write_text
    asked = dict(verb=verb, base='digits-teacher', data=None) | dataclasses.asdict(recipe)
    write_text(folder/'recipe.json', json.dumps(asked))


def pytest_addoption(parser):
    parser.addoption('--regold', action='store_true', help="write tests/golden.json anew instead of comparing with it")


def pytest_configure(config):
    "A checkout that was never installed can be tested too, also by the processes that tests start"
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


def python(*args, cwd=None, env={}, timeout=300):
    "Run Python in a process of its own"
    argv = [sys.executable, *map(str, args)]
    return subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout)


def sfv(*args, **kwargs):
    "Run `sfv-lite` in a process of its own"
    return python('-c', 'import sys; from sfv_lite.cli import main; sys.exit(main())', *args, **kwargs)


def sets(**overrides):
    "Overrides of a recipe as the command line takes them"
    return [o for k,v in overrides.items() for o in ('--set', f'{k}={v}')]


def files(folder):
    "Every file below a folder with its bytes"
    return {str(o.relative_to(folder)): o.read_bytes() for o in sorted(Path(folder).rglob('*')) if o.is_file()}


def rows_of(shards):
    "Every row of a folder of shards"
    import numpy as np
    from sfv_lite.stream import Clips, load_manifest
    clips = Clips(shards, load_manifest(shards), lambda film: True)
    return clips.read(np.arange(len(clips)))


def relative(a, b):
    "‖a − b‖ / ‖b‖"
    return float((a-b).norm()/b.norm())


def recipe(**overrides):
    "The digits recipe, made tiny"
    from sfv_lite.recipe import Recipe
    return Recipe.load('digits', **{**TINY, **overrides})


@pytest.fixture
def pipe():
    "A stock pipeline of the digits' size with random weights"
    from sfv_lite.svd import digits_pipeline
    pipe = digits_pipeline(3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    "The folder of such a pipeline"
    from sfv_lite.pipelines import save_pipeline
    from sfv_lite.svd import digits_pipeline
    return save_pipeline(digits_pipeline(4), tmp_path_factory.mktemp('base')/'base')


@pytest.fixture(scope='session')
def picture(tmp_path_factory):
    "A PNG of a handwritten digit"
    from PIL import Image
    from sfv_lite.video import moving_digits, to_uint8
    path = tmp_path_factory.mktemp('picture')/'seven.png'
    Image.fromarray(to_uint8(moving_digits(1, split='test')[0][0,0]).transpose(1,2,0)).save(path)
    return path
