"What is shipped: the wheel, the weights in it, and settings.ini"
import configparser, dataclasses, json, re, zipfile
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file
from conftest import ROOT, python
from sfv_lite.pipelines import SHIPPED, WEIGHTS, load_pipeline, pretrained
from sfv_lite.recipe import Recipe, settings_path
from sfv_lite.svd import decode, encode
from sfv_lite.video import moving_digits

DEFAULT = re.search(r'^\[DEFAULT\]$(.*?)^\[', (ROOT/'settings.ini').read_text(), re.M|re.S)[1].strip().splitlines()


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The package as a wheel, built from this checkout"
    out = tmp_path_factory.mktemp('wheel')
    done = python('-m', 'build', '--wheel', '--no-isolation', '--outdir', out, ROOT)
    assert done.returncode==0, done.stdout+done.stderr
    path, = out.glob('*.whl')
    return path


def test_wheel_is_whole(wheel, tmp_path):
    """Unpacked elsewhere, the wheel finds its own settings.ini and weights from any working directory,
    and installs `sfv-lite`"""
    site,cwd = tmp_path/'site',tmp_path/'elsewhere'
    zipfile.ZipFile(wheel).extractall(site)
    cwd.mkdir()
    code = '''
import sfv_lite
from sfv_lite.pipelines import pretrained
from sfv_lite.recipe import Recipe, settings_path
from sfv_lite.svd import decode, encode
from sfv_lite.video import moving_digits
print(sfv_lite.__file__, settings_path(), pretrained('digits'), pretrained('digits-teacher'), sep='\\n')
assert Recipe.load('digits').frames==8
'''
    done = python('-c', code, cwd=cwd, env=dict(PYTHONPATH=str(site)))
    assert done.returncode==0, done.stderr
    expected = ('__init__.py','settings.ini','weights/digits','weights/digits-teacher')
    assert [Path(o) for o in done.stdout.split()] == [site/'sfv_lite'/o for o in expected]
    assert (site/'sfv_lite/settings.ini').read_bytes()==(ROOT/'settings.ini').read_bytes()
    entry, = site.glob('*.dist-info/entry_points.txt')
    assert 'sfv-lite = sfv_lite.cli:main' in entry.read_text()


def test_wheel_holds_only_the_package(wheel):
    "Every module, JSON and safetensors, no pickles, tests, notebooks or leftovers"
    names = [o for o in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in o]
    assert {o.name for o in (ROOT/'sfv_lite').glob('*.py')} == {Path(o).name for o in names if o.endswith('.py')}
    kinds = ('.py','.ini','.json','.safetensors','.md')
    assert all(o.startswith('sfv_lite/') and Path(o).suffix in kinds for o in names), names


def test_checkout_uses_its_root_settings():
    "In a checkout (an editable install) the root's settings.ini is the one that counts, and there is no second one"
    assert settings_path()==ROOT/'settings.ini' and not (ROOT/'sfv_lite/settings.ini').exists()


def test_weights_are_small_and_safe():
    """Shipped weights: at most 20 MB together, UNet and VAE in fp16, safetensors and JSON only, stock class names,
    a model card each; and the judge"""
    found = [o for o in WEIGHTS.rglob('*') if o.is_file()]
    assert sum(o.stat().st_size for o in found) <= 20e6
    assert {o.suffix for o in found} == {'.json','.safetensors','.md'}
    assert {o.relative_to(WEIGHTS).parts[0] for o in found} == {*SHIPPED, 'judge.safetensors'}
    assert (WEIGHTS/'judge.safetensors').stat().st_size <= 2e6
    for name in SHIPPED:
        index = json.loads((pretrained(name)/'model_index.json').read_text())
        assert index['_class_name']=='StableVideoDiffusionPipeline'
        card = (pretrained(name)/'README.md').read_text()
        assert all(o in card for o in ('sfv-lite','minutes','± ','## Limits'))
        for part in ('unet','vae'): # the tower may stay in fp32: transformers opens it in the type it was saved in
            with safe_open(pretrained(name)/part/'diffusion_pytorch_model.safetensors', 'pt') as f:
                assert {f.get_slice(k).get_dtype() for k in f.keys()} == {'F16'}, (name, part)


def test_every_frame_is_decoded_well():
    "At least 38 dB in each of the eight frames, and strokes without a tint: green within .01 of red and blue"
    pipe = load_pipeline('digits')
    x,_ = moving_digits(64, 77, 'test')
    y = decode(pipe.vae, encode(pipe, x).latents)
    psnr = 10*torch.log10(4/(y-x).square().mean((0,2,3,4)))
    strokes = (x[:,:,0]>0).float()
    green = ((y[:,:,1]-(y[:,:,0]+y[:,:,2])/2)*strokes).sum((0,2,3))/strokes.sum((0,2,3))
    assert (psnr>=38).all() and (green.abs()<=.01).all(), (psnr, green)
    vaes = [load_file(pretrained(o)/'vae'/'diffusion_pytorch_model.safetensors') for o in SHIPPED]
    assert all(torch.equal(v, vaes[1][k]) for k,v in vaes[0].items())


def test_shipped_weights_open_in_plain_diffusers(picture):
    "`DiffusionPipeline.from_pretrained`, without any option, opens the shipped student and one step makes a clip"
    code = '''
import sys
from diffusers import DiffusionPipeline
from PIL import Image
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
one_step = dict(num_inference_steps=1, min_guidance_scale=1., max_guidance_scale=1.)
clip = pipe(Image.open(sys.argv[2]), 32, 32, **one_step, output_type='pt').frames
assert clip.shape==(1,8,3,32,32) and clip.isfinite().all()
'''
    done = python('-I', '-c', code, pretrained('digits'), picture)
    assert done.returncode==0, done.stderr.splitlines()[-1]


def test_every_default_is_explained():
    """In [DEFAULT] every key, or group of keys without a blank line or comment between them,
    stands below a comment of its own"""
    for before,line in zip(['']+DEFAULT, DEFAULT):
        if '=' in line and line[0]!='#':
            assert before.strip() and not re.fullmatch(r'#.*-{9,}', before), f"no comment above: {line}"


def test_settings_and_recipe_have_the_same_keys():
    """[DEFAULT] names every key that has no default of its own, nothing else;
    all recipes load, so that no section holds an unknown key or a wrong value"""
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str
    ini.read(ROOT/'settings.ini')
    required = {o.name for o in dataclasses.fields(Recipe) if o.name!='name' and o.default is dataclasses.MISSING}
    assert set(ini.defaults())==required
    for name in ini.sections(): assert Recipe.load(name).name==name
    assert 'digits' in ini.sections()


def test_paper_defaults():
    "[DEFAULT] is the paper: §4 and equations (5, 7, 10)"
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str
    ini.read(ROOT/'settings.ini')
    d = ini.defaults()
    paper = dict(frames=14, width=768, height=448, fps=7, T_g=4, T_d=1000, P_mean=-1, P_std=-1, lam=.1,
        lr_g=1e-5, lr_d=1e-4, momentum=.5, beta=.999, steps=50000, batch=32, accumulation=4, ema=.95)
    assert {k:float(d[k]) for k in paper}==paper and d['optimizer']=='sm3'
