"""What a step of `distil` costs: no more than its parts, little of it in the heads, nothing for weights that stay,
and memory a laptop has"""
import sys
import pytest, torch
from conftest import python, recipe
from sfv_lite import measure
from sfv_lite.runs import make_accelerator
from sfv_lite.measure import count_flops, step_cost, step_parts
from sfv_lite.objective import hinge_g
from sfv_lite.recipe import Recipe
from sfv_lite.sfv import distil_step
from sfv_lite.train import make_state
from sfv_lite.svd import encode
from sfv_lite.video import moving_digits


@pytest.fixture
def state_and_batch(pipe):
    r = recipe(batch=2, r1_every=4)
    return make_state(pipe, r, make_accelerator(r)),encode(pipe, moving_digits(2)[0])


def test_step_costs_no_more_than_its_parts(state_and_batch):
    """FLOPs of a whole step, with R1 and without, are within 2 % of the sum of its parts;
    heads take at most a quarter of it, R1 counted in every fourth step"""
    state,batch = state_and_batch
    parts = {k:count_flops(f) for k,f in step_parts(state, batch).items()}
    r1 = parts.pop('heads, R1')
    assert min(*parts.values(), r1)>0
    def step(at):
        state.step = at
        return count_flops(lambda: distil_step(state, batch))
    without,due = step(1),step(4)
    assert sum(parts.values())*.98 <= without <= sum(parts.values())*1.02
    assert (sum(parts.values())+r1)*.98 <= due <= (sum(parts.values())+r1)*1.02
    heads = sum(v for k,v in parts.items() if k.startswith('heads'))
    assert heads+r1/4 <= .25*(without+r1/4)


def test_step_cost_reports_the_same(base):
    """`step_cost`, which `sfv-lite bench` prints: the parts, their sum without R1, and the step,
    which is within 2 % of it"""
    rows = {o['part']:o for o in step_cost(recipe(batch=2), base, repeats=1)}
    parts,total,step = list(rows.values())[:-2],rows['sum of the parts but R1'],rows['a step of distil']
    assert total['GFLOP a clip']==pytest.approx(sum(o['GFLOP a clip'] for o in parts if 'R1' not in o['part']))
    assert step['GFLOP a clip'] <= 1.02*total['GFLOP a clip']
    assert all(o['seconds']>0 for o in rows.values())


def test_no_flops_for_weights_that_stay(state_and_batch):
    """The input gradient through the frozen eye, and G's gradient through the heads, cost one more forward;
    a backward into weights would cost two, as it does for the heads' own loss"""
    state,batch = state_and_batch
    parts = {k:count_flops(f) for k,f in step_parts(state, batch).items()}
    eye,through_eye = parts['encoder on real, forward'],parts['encoder on fake, forward and input gradient']
    assert eye < through_eye <= 2.1*eye
    sigma = torch.ones(2)
    with torch.no_grad(): features = state.D.features(batch.latents, sigma, batch.cond)
    leaves = [f.detach().requires_grad_() for f in features]
    heads = lambda: hinge_g(state.D.heads(leaves, sigma, batch.cond))
    state.opt_d.zero_grad()
    forward,to_leaf = count_flops(heads),count_flops(lambda: torch.autograd.grad(heads(), leaves))
    to_weights = count_flops(lambda: heads().backward())
    assert to_leaf <= 2.1*forward and to_weights >= 2.7*forward
    state.opt_d.zero_grad()
    torch.autograd.grad(heads(), leaves)
    assert all(p.grad is None for p in state.heads.parameters())


STEP = '''
import resource, sys
from sfv_lite.runs import make_accelerator
from sfv_lite.recipe import Recipe
from sfv_lite.sfv import distil_step
from sfv_lite.train import make_state
from sfv_lite.svd import digits_pipeline, encode
from sfv_lite.video import moving_digits
r,pipe = Recipe.load('digits', head_start=0, precision='no'),digits_pipeline()
state,batch = make_state(pipe, r, make_accelerator(r)),encode(pipe, moving_digits(r.batch)[0])
for _ in range(2): row = distil_step(state, batch)
try: # Linux's ru_maxrss begins at the parent's
    peak = next(int(o.split()[1])*1024 for o in open('/proc/self/status') if o.startswith('VmHWM'))
except OSError: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform=='darwin' else 1024)
print(peak/2**30)
'''


def test_step_fits_a_laptop():
    """Steps of the digits recipe at its full batch, with R1 and without, in a fresh process:
    at most 2 GB at their peak, Python and PyTorch included"""
    done = python('-c', STEP)
    assert done.returncode==0, done.stderr
    assert .1 < float(done.stdout.split()[-1]) <= 2


def test_memory_is_left_out_where_python_cannot_tell(monkeypatch):
    "As on Windows, which has no module `resource`: `bench` goes without that table"
    assert .1<measure.peak_memory()<64
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert measure.peak_memory() is None
    for name in ('step_cost','latency','ratios','start_up'): monkeypatch.setattr(measure, name, lambda *_: [])
    assert list(measure.bench(Recipe.load('digits')))==['a training step','one clip','start-up','ratios']
