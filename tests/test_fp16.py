"Scaled losses, on a CPU: the same gradients whatever the scale, an overflow skips the step and lowers the scale"
import contextlib
from types import SimpleNamespace
import pytest, torch
from conftest import recipe
from sfv_lite import train
from sfv_lite.cli import main
from sfv_lite.recipe import RecipeError
from sfv_lite.runs import make_accelerator, precision_for
from sfv_lite.sfv import distil_step, learning
from sfv_lite.svd import Batch, Condition, digits_pipeline


def state_of(scale=None, **keys):
    "A state in double precision, whose accelerate scales losses as for fp16 if asked"
    r = recipe(optimizer='adamw', head_start=0, lr_g=1e-3, lr_d=1e-3, r1_every=1, **keys)
    acc = make_accelerator(r)
    s = train.make_state(digits_pipeline(3).to(torch.float64), r, acc)
    if scale: # from now on, as accelerate refuses it on a CPU, which has no fp16 to speak of
        acc.native_amp,acc.scaler,acc.state._mixed_precision = True,torch.amp.GradScaler('cpu', init_scale=scale),'fp16'
        acc.autocast = contextlib.nullcontext
        s.opt_g.scaler = s.opt_d.scaler = acc.scaler
    s.heads.double()
    return s


def batch(n=4):
    g = torch.Generator().manual_seed(0)
    x = lambda *shape: torch.randn(*shape, generator=g).double()
    return Batch(x(n,8,4,8,8), Condition(x(n,4,8,8), x(n,1,64), x(n,3)))


@pytest.mark.parametrize('accumulation', [1,2])
def test_the_scale_is_not_seen(accumulation):
    "Three steps with scale 1, 2¹⁰ and none: the same losses, norms, weights and moments"
    def run(scale):
        s = state_of(scale, accumulation=accumulation)
        b = batch()
        parts = b[:2],b[2:]
        rows = [distil_step(s, o) for _ in range(3) for o in (parts if accumulation>1 else [b])]
        moments = [o['exp_avg'] for opt in (s.opt_g,s.opt_d) for o in opt.state.values()] # AdamW's steps hide a scale
        return [o for o in rows if o],[*map(torch.clone, (*learning(s.G), *s.heads.parameters())), *moments],s
    plain,weights,_ = run(None)
    for scale in (1., 2.**10):
        rows,other,s = run(scale)
        assert len(rows)==len(plain)==3 and s.step==3 and s.accelerator.scaler.get_scale()==scale
        for a,b in zip(rows, plain):
            assert a==pytest.approx(b, rel=1e-5)
        for a,b in zip(other, weights): assert (a-b).norm()<1e-5*b.norm()+1e-12


def test_an_overflow_lowers_the_scale():
    "The step is skipped, the weights stay, the scale is halved; the next one steps"
    s = state_of(2.**10)
    before = [p.detach().clone() for p in learning(s.G)]
    wrong = learning(s.G)[0].register_hook(lambda g: g*torch.inf)
    assert distil_step(s, batch())['skipped'] and s.step==0 and s.accelerator.scaler.get_scale()==2.**9
    assert all(torch.equal(p, o) for p,o in zip(learning(s.G), before))
    wrong.remove()
    assert 'skipped' not in distil_step(s, batch()) and s.step==1


def test_a_card_without_it(monkeypatch, base, tmp_path, capsys):
    "One line with the cure: fp16 on a CPU, bf16 on a card that only emulates it; `auto` takes neither"
    cuda = SimpleNamespace(type='cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')
    with pytest.raises(RecipeError, match='Tesla T4 does not compute in bf16; set precision = fp16'):
        precision_for(recipe(precision='bf16'), cuda)
    assert precision_for(recipe(precision='auto'), cuda)=='no' and precision_for(recipe(precision='fp16'), cuda)=='fp16'
    out = tmp_path/'run'
    assert main(['distil', '--base', str(base), '-o', str(out), '--set', 'precision=fp16'])!=0
    said = capsys.readouterr().err
    assert 'precision = fp16: is for GPUs' in said and len(said.splitlines())==1 and not out.exists()
