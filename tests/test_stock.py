"Our sampler, conditioning and checkpoints against diffusers' own Stable Video Diffusion"
import json
import numpy as np, pytest, torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from conftest import python, relative
from sfv_lite.edm import karras_sigmas
from sfv_lite.files import as_rgb, load_image
from sfv_lite.pipelines import SFVPipeline, load_pipeline, save_pipeline
from sfv_lite.sampling import sample_euler, sample_once
from sfv_lite.svd import Denoiser, condition, decode
from sfv_lite.video import moving_digits, to_uint8

AUG = .1
seeded = lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def pictures():
    "Two first frames: as tensor, and as the PIL pictures that stock takes"
    x = moving_digits(2, split='test')[0][:,0]
    pixels = to_uint8(x)
    return torch.from_numpy(pixels)/127.5-1, [Image.fromarray(o.transpose(1,2,0)) for o in pixels]


@pytest.fixture
def noise(): return torch.randn(2, 8, 4, 8, 8, generator=seeded(1))


@pytest.mark.parametrize('steps,guidance', [(25,3.),(1,1.)])
def test_sampling_equals_stock(pipe, pictures, noise, steps, guidance):
    """25 guided steps and the single one give stock's latents, from the same picture, noise on the picture and noise.

    What remains (under 1e-3 of the norm) is arithmetic. Stock starts at √(700²+1) = 700.0007 times the noise,
    we at 700. And stock's Euler step, x − σ·(x−x̂0)/σ for the last one, takes numbers of about 2000 from each other
    to get latents of about 1: fp32 keeps 7 digits of the 2000."""
    n = 1 if steps>1 else 2 # clips
    x,pil,noise = pictures[0][:n],pictures[1][:n],noise[:n]
    D,cond = Denoiser(pipe.unet).eval(),condition(pipe, x, noise_aug=AUG, generator=seeded())
    def ours(g):
        if steps==1: return sample_once(D, cond, noise)
        return sample_euler(D, cond, noise, karras_sigmas(25).flip(0), torch.linspace(1, g, 8))
    stock = pipe(pil, 32, 32, num_inference_steps=steps, min_guidance_scale=1., max_guidance_scale=guidance,
        noise_aug_strength=AUG, generator=seeded(), latents=noise, output_type='latent').frames
    assert relative(ours(guidance), stock) <= 1e-3
    blind = "guidance makes no difference here, so that this test would see nothing of it"
    if guidance>1: assert relative(ours(1.), stock) > 2e-3, blind


def test_conditioning_equals_stock(pipe, pictures):
    """The three things SVD is told are what stock's private encoders make:
    VAE mode of the noisy picture, unscaled; CLIP of the clean one; [fps − 1, bucket, noise]"""
    x,pil = pictures
    cond = condition(pipe, x, fps=9, motion_bucket=50, noise_aug=AUG, generator=seeded())
    noisy = pipe.video_processor.preprocess(pil, 32, 32) + AUG*torch.randn(x.shape, generator=seeded())
    with torch.no_grad():
        latents,embeds = pipe._encode_vae_image(noisy, 'cpu', 1, False), pipe._encode_image(pil, 'cpu', 1, False)
    torch.testing.assert_close(cond.image_latents, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond.image_embeds, embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond.added_time_ids, pipe._get_add_time_ids(9-1, 50, AUG, torch.float32, 2, 1, False))


def test_sfv_pipeline_is_one_step(pipe, pictures, noise):
    """`SFVPipeline`, called with nothing but a picture, is `sample_once` and `decode`;
    its other arguments stand where stock's stand"""
    x,pil = pictures
    sfv = SFVPipeline(**pipe.components)
    sfv.set_progress_bar_config(disable=True)
    cond = condition(pipe, x, generator=seeded())
    expected = decode(pipe.vae, sample_once(Denoiser(pipe.unet).eval(), cond, noise)).clamp(-1,1)/2+.5
    call = lambda *size: sfv(pil, *size, generator=seeded(), latents=noise, output_type='pt').frames
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-3)
    assert torch.equal(call(32,32), call())


@pytest.mark.parametrize('mode', ['1','L','LA','P','RGBA','CMYK','YCbCr','HSV','I;16','I','F'])
def test_sfv_pipeline_takes_pictures_of_any_mode(pipe, pictures, noise, mode, tmp_path):
    "As `load_image` reads them from a file; alone or in a list"
    image = pictures[1][0].convert('L' if mode in ('I;16','I','F') else mode)
    if mode in ('I;16','I'): image = Image.fromarray(np.array(image, dtype=np.uint16)*257).convert(mode)
    if mode=='F': image = image.convert('F')
    sfv = SFVPipeline(**pipe.components)
    sfv.set_progress_bar_config(disable=True)
    def call(image): return sfv(image, generator=seeded(), latents=noise[:1], output_type='pt').frames
    if mode=='F':
        with pytest.raises(ValueError, match='8 or 16 bits'): call(image)
        return
    assert torch.equal(call(image), call(as_rgb(image))) and torch.equal(call([image]), call(image))
    if mode not in ('HSV','YCbCr','CMYK'):
        file = tmp_path/('a.tif' if mode=='I' else 'a.png')
        image.save(file)
        read = load_image(file)
        assert (torch.from_numpy(np.array(as_rgb(image)))/127.5-1).permute(2,0,1).equal(read)


STOCK_ONLY = '''
import importlib.abc, sys
class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0]=='sfv_lite': raise ImportError('sfv_lite is not here')
sys.meta_path.insert(0, NotHere())
try: import sfv_lite
except ImportError: pass
else: sys.exit('sfv_lite could be imported')
import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image
picture,noise,*folders = sys.argv[1:]
for folder in folders:
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__=='StableVideoDiffusionPipeline', type(pipe)
    clip = pipe(Image.open(picture), 32, 32, num_inference_steps=1, min_guidance_scale=1., max_guidance_scale=1.,
        generator=torch.Generator().manual_seed(0), latents=torch.from_numpy(np.load(noise)), output_type='np').frames
    np.save(folder+'.npy', clip)
'''


def test_checkpoint_opens_without_this_package(pipe, picture, noise, tmp_path):
    """Saved folders hold safetensors, JSON and stock class names only;
    plain diffusers opens them where `sfv_lite` cannot be imported, and one step gives the same clip,
    within a quarter of a grey level (fp32 again; fp16 weights: a few)"""
    sfv = SFVPipeline(**pipe.components)
    sfv.set_progress_bar_config(disable=True)
    folders = {'plain':save_pipeline(pipe, tmp_path/'plain'), 'sfv':tmp_path/'sfv',
        'half':save_pipeline(pipe, tmp_path/'half', torch.float16)}
    sfv.save_pretrained(folders['sfv'])
    classes = dict(vae='AutoencoderKLTemporalDecoder', unet='UNetSpatioTemporalConditionModel',
        image_encoder='CLIPVisionModelWithProjection', feature_extractor='CLIPImageProcessor',
        scheduler='EulerDiscreteScheduler')
    for folder in folders.values():
        assert {o.suffix for o in folder.rglob('*') if o.is_file()} == {'.json','.safetensors'}
        index = json.loads((folder/'model_index.json').read_text())
        assert index['_class_name']=='StableVideoDiffusionPipeline'
        assert {k:v[1] for k,v in index.items() if k[0]!='_'} == classes
    np.save(tmp_path/'noise.npy', noise[:1].numpy())
    done = python('-I', '-c', STOCK_ONLY, picture, tmp_path/'noise.npy', *folders.values(), cwd=tmp_path)
    assert done.returncode==0, done.stderr
    expected = sfv(Image.open(picture), generator=seeded(), latents=noise[:1], output_type='np').frames
    assert expected.std()>1e-3, "a flat clip would prove nothing"
    for name,atol in (('plain',1e-3), ('sfv',1e-3), ('half',2e-2)):
        np.testing.assert_allclose(np.load(f'{folders[name]}.npy'), expected, rtol=0, atol=atol, err_msg=name)
    again = SFVPipeline.from_pretrained(folders['plain'])
    clip = again(Image.open(picture), generator=seeded(), latents=noise[:1], output_type='np').frames
    np.testing.assert_allclose(clip, expected, rtol=0, atol=1e-3)


def test_loading_is_exact(pipe, tmp_path):
    "Saved and loaded weights are the same bits, in every network and in the scheduler's numbers"
    again = load_pipeline(save_pipeline(pipe, tmp_path/'saved'))
    assert type(again) is StableVideoDiffusionPipeline
    for name in ('vae','unet','image_encoder'):
        old,new = (getattr(o,name).state_dict() for o in (pipe,again))
        assert old.keys()==new.keys() and all(torch.equal(old[k],new[k]) for k in old), name
    drop = lambda c: {k:v for k,v in c.items() if k[0]!='_'}
    assert drop(again.scheduler.config)==drop(pipe.scheduler.config)
