"One UNet in three roles: base of G, teacher and the judges' eye"
import json, shutil
import pytest, torch
from conftest import files, recipe
from sfv_lite import checkpoint, loop, sfv, train
from sfv_lite.export import student_of
from sfv_lite.heads import Discriminator
from sfv_lite.pipelines import save_pipeline
from sfv_lite.runs import LATER, make_accelerator, recipe_of
from sfv_lite.sfv import learning
from sfv_lite.train import make_state
from sfv_lite.svd import Batch, Condition, digits_pipeline, svd_pipeline


def state_of(pipe, **overrides):
    "A state in float64 whose additions do something"
    r = recipe(steps=4, **overrides)
    s = make_state(pipe.to(torch.float64), r, make_accelerator(r))
    g = torch.Generator().manual_seed(5)
    for p in learning(s.G): p.data.copy_(p.data + .05*torch.randn(p.shape, generator=g))
    s.D.double()
    return s


def gradients(s, batch):
    "What one step would descend along"
    sfv.gradients(s, batch)
    return [p.grad.clone() for p in [*learning(s.G), *s.D.heads.parameters()]]


@pytest.mark.parametrize('size', ['digits','svd'])
def test_gradients_are_those_of_two_copies(size):
    "Shared UNet and blocks computed twice, against an eye of its own and blocks computed once"
    make = digits_pipeline if size=='digits' else lambda: svd_pipeline(small=True)
    batch = random_batch(make())
    tap = dict(tap='before' if size=='digits' else 'after')
    shared = state_of(make(), lora_rank=4, checkpointing=True, **tap)
    assert shared.D.encoder is shared.accelerator.unwrap_model(shared.G).unet
    two = state_of(make(), lora_rank=4, **tap)
    D = Discriminator(make().unet.double(), tap=tap['tap'], width=two.recipe.head_width).double()
    D.heads = two.D.heads
    two.D = D
    found,expected = (gradients(o, batch) for o in (shared,two))
    least = 1e-12*max(o.norm() for o in expected) # attention within a single position has no gradient but rounding
    for a,b in zip(found, expected, strict=True): assert (a-b).norm()<1e-9*b.norm()+least


@pytest.mark.parametrize('begun', ['base','init'])
def test_delivered_into_what_it_began_with(begun, tmp_path):
    """The base was replaced, or taken away, while a run of additions went on: it is not delivered into another one;
    put back, `--resume` delivers what it would have"""
    for k in (4,5): save_pipeline(digits_pipeline(k), tmp_path/f'{k}')
    shutil.copytree(tmp_path/'4', tmp_path/'start')
    r,names = recipe(lora_rank=2, lr_g=1e-2, steps=3),dict(base=tmp_path/'4') | {begun:tmp_path/'start'}
    whole = train.distil(r, tmp_path/'whole', **names)
    def swapped(other):
        def save(state):
            keep(state)
            shutil.rmtree(tmp_path/'start', ignore_errors=True)
            if other: shutil.copytree(tmp_path/'5', tmp_path/'start')
        keep = checkpoint.save
        return save
    for k,other in enumerate((True,False)):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(loop, 'save', swapped(other))
            with pytest.raises((ValueError,FileNotFoundError), match='--resume delivers'):
                train.distil(r, tmp_path/f'run{k}', **names)
        assert not (tmp_path/f'run{k}'/'pipeline').exists()
        shutil.rmtree(tmp_path/'start', ignore_errors=True)
        shutil.copytree(tmp_path/'4', tmp_path/'start')
        again = train.distil(r, tmp_path/f'run{k}', **names, resume=True)
        assert files(again/'unet')==files(whole/'unet')


def test_runs_from_before_some_keys(tmp_path):
    "A recipe.json without keys that came later is one in which they are off"
    save_pipeline(digits_pipeline(4), tmp_path/'base')
    train.distil(recipe(lora_rank=2, steps=2, validate_every=2), tmp_path/'run', tmp_path/'base')
    file = tmp_path/'run'/'recipe.json'
    said = json.loads(file.read_text())
    for k in LATER: del said[k]
    file.write_text(json.dumps(said))
    assert not recipe_of(said).compile and student_of(tmp_path/'run', '2')


def random_batch(pipe, b=2):
    c,g = pipe.unet.config,torch.Generator().manual_seed(1)
    r = lambda *shape: torch.randn(*shape, generator=g).double()
    latents,ids = r(b,c.num_frames,4,8,8),torch.tensor([[6.,127.,.02]]*b).double()
    return Batch(latents, Condition(r(b,4,8,8), r(b,1,c.cross_attention_dim), ids))
