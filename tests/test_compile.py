"Blocks that PyTorch's compiler makes: the same run, nothing compiled twice; and who has no compiler is told in a line"
import csv
from collections import Counter
import pytest, torch
from conftest import TINY, recipe, sets
from sfv_lite import fit, train
from sfv_lite.cli import main
from sfv_lite.fit import add_lora, checkpoint_blocks, compile_blocks, without_lora
from sfv_lite.shortcuts import take_short_cuts
from sfv_lite.svd import Condition, Denoiser, digits_pipeline


@pytest.fixture(autouse=True)
def graphs_alone(monkeypatch):
    "The compiler's graphs without its fusing, which takes minutes on a CPU; and nothing from the test before"
    monkeypatch.setattr(fit, 'BACKEND', 'aot_eager')
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs(): return torch._dynamo.utils.counters['stats']['unique_graphs']


@pytest.mark.slow
@pytest.mark.parametrize('more', [pytest.param({}, id='every weight', marks=pytest.mark.huge),
    pytest.param(dict(lora_rank=2, checkpointing=True), id='LoRA, recomputed')])
def test_a_run_is_compiled_once(base, tmp_path, monkeypatch, more):
    """Figures equal those of a run that is not compiled, every block's graph is whole, and after the first step
    nothing is compiled any more, pictures and validation included after their first time"""
    seen,see = [],train.distil_step
    monkeypatch.setattr(train, 'distil_step', lambda *a: (see(*a), seen.append(graphs()))[0])
    how = dict(validate_every=3, sample_every=3, r1_every=2, log_every=1) | more
    for name,compiled in dict(plain=False, fused=True).items():
        train.distil(recipe(compile=compiled, **how), tmp_path/name, base)
    plain,fused = (list(csv.DictReader((tmp_path/o/'log.csv').open(newline=''))) for o in ('plain','fused'))
    for a,b in zip(plain, fused, strict=True):
        for k in ('d_real','d_fake','adv','recon','grad_g','grad_d'):
            assert float(b[k])==pytest.approx(float(a[k]), rel=2e-3, abs=1e-5), (k,a['step'])
    first,*rest = seen[6:] # of the second run
    assert first>0 and not torch._dynamo.utils.counters['graph_break']
    assert rest[:2]==[first,first] and rest[2:]==[rest[2]]*3, seen # a picture has some of its own


def test_blocks_of_a_kind_share(base):
    "Fewer graphs than blocks; with and without additions each once, however often they are put off and on"
    unet = take_short_cuts(digits_pipeline(0).unet)
    add_lora(unet, 2)
    checkpoint_blocks(unet)
    compile_blocks(unet)
    D,cond = Denoiser(unet),Condition(torch.randn(1,4,8,8), torch.randn(1,1,64), torch.rand(1,3))
    def ask(): D(torch.randn(1,8,4,8,8), torch.ones(1), cond).sum().backward()
    def ask_plain():
        with without_lora(unet), torch.no_grad(): D(torch.randn(1,8,4,8,8), torch.ones(1), cond)
    found = []
    for _ in range(3):
        ask()
        ask_plain()
        found.append(graphs())
    blocks = Counter(type(o).__name__ for o in unet.modules() if getattr(o, '_compiled_call_impl', None))
    assert found[0]==found[2]<2*sum(blocks.values()), (found, blocks)


def test_no_compiler(base, tmp_path, monkeypatch, capsys):
    "One line with the cure, before anything is written"
    def none(): raise RuntimeError('none here')
    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', none)
    out = tmp_path/'run'
    assert main(['distil', '--base', str(base), '-o', str(out), *sets(**TINY, compile='true')])!=0
    said = capsys.readouterr().err
    assert 'compile = true: needs a C++ compiler' in said and len(said.splitlines())==1 and not out.exists()
    assert main(['sample', str(base), '--compile', '-o', str(out)])!=0
    assert '--compile: needs a C++ compiler' in capsys.readouterr().err and not out.exists()
