"One UNet in three roles: base of G, teacher and the judges' eye"
import pytest, torch
from conftest import recipe, relative
from sfv_lite.heads import Discriminator
from sfv_lite.runs import make_accelerator
from sfv_lite import sfv
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


def random_batch(pipe, b=2):
    c,g = pipe.unet.config,torch.Generator().manual_seed(1)
    r = lambda *shape: torch.randn(*shape, generator=g).double()
    latents,ids = r(b,c.num_frames,4,8,8),torch.tensor([[6.,127.,.02]]*b).double()
    return Batch(latents, Condition(r(b,4,8,8), r(b,1,c.cross_attention_dim), ids))
