"What a user waits for before anything runs"
import pytest, time
from conftest import python

COMMANDS = {'import sfv_lite':('import sfv_lite', .3),
    'sfv-lite --help':('from sfv_lite.cli import main; main(["--help"])', 1.)}


def seconds(code):
    start = time.perf_counter()
    assert python('-c', code).returncode==0
    return time.perf_counter()-start


@pytest.mark.parametrize('name', COMMANDS)
def test_start_up(name):
    """`import sfv_lite` takes at most 0.3 s and `sfv-lite --help` at most 1 s more than Python itself;
    the best of five counts, as other work may disturb some"""
    code,limit = COMMANDS[name]
    pairs = [(seconds(code), seconds('pass')) for _ in range(5)]
    assert min(o for o,_ in pairs) - min(o for _,o in pairs) <= limit


@pytest.mark.parametrize('name', COMMANDS)
def test_nothing_heavy_is_imported(name):
    "Neither imports torch, diffusers or their like: a verb does, when it runs"
    code = f"""if 1:
        import atexit, sys
        atexit.register(lambda: print('HAS', *sorted({{o.partition('.')[0] for o in sys.modules}})))
        {COMMANDS[name][0]}"""
    done = python('-c', code)
    has = set(done.stdout.split('HAS')[-1].split())
    assert done.returncode==0 and 'sfv_lite' in has, done.stderr
    heavy = {'torch','diffusers','transformers','accelerate','numpy','matplotlib','PIL','av','sklearn','IPython'}
    assert not has & heavy
