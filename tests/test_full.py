"SVD's own shape, a tenth as wide: the way from videos to a clip by command lines; and, marked slow, its true width"
import json, re
import pytest, torch
from conftest import files, python, sets, sfv
from PIL import Image
from sfv_lite.cli import main
from sfv_lite.files import load_clip, save_clip
from sfv_lite.fit import LEARNS
from sfv_lite.pipelines import load_decoder, load_pipeline, save_pipeline
from sfv_lite.svd import Denoiser, condition, decode, svd_pipeline
from sfv_lite.video import moving_digits

SMALL = sets(height=64, width=64, head_width=16, steps=3, head_start=0, batch=2, accumulation=2,
    save_every=2, sample_every=3, log_every=1)


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "An untrained base, a video, its shards, a picture"
    folder = tmp_path_factory.mktemp('full')
    save_pipeline(svd_pipeline(small=True), folder/'base')
    (folder/'videos').mkdir()
    x = moving_digits(8, seed=1)[0].flatten(0,1)
    save_clip(torch.nn.functional.interpolate(x, (64,64)), folder/'videos/one.mp4')
    Image.new('RGB', (100,80), 'red').save(folder/'picture.png')
    argv = ['prepare', 'videos', '-o', 'shards', '--base', 'base', '--recipe', 'svd', '--shot', 1]
    done = sfv(*argv, *sets(height=64, width=64), cwd=folder)
    assert done.returncode==0, done.stderr
    return folder


@pytest.mark.parametrize('recipe', ['svd','svd-lora'])
def test_from_videos_to_a_clip(recipe, desk, tmp_path):
    """distil on shards, stopped by its schedule after three steps; export; sample:
    stock layers only, no trace of the additions, and the clip is what the exported UNet makes"""
    more = sets(lora_rank=4) if recipe=='svd-lora' else []
    argv = ['distil', '--recipe', recipe, '--base', 'base', '--data', 'shards', '-o', tmp_path/'run']
    done = sfv(*argv, *SMALL, *more, cwd=desk)
    assert done.returncode==0, done.stderr
    state = sum(o.stat().st_size for o in (tmp_path/'run/state').rglob('model*.safetensors'))
    assert (state<5e6)==(recipe=='svd-lora'), "with LoRA only the additions are kept in a state"
    assert main(['export', str(tmp_path/'run'), '-o', str(tmp_path/'out'), '--dtype', 'fp32'])==0
    base,student = load_pipeline(desk/'base'),load_pipeline(tmp_path/'out')
    assert list(student.unet.state_dict())==list(base.unet.state_dict())
    moved = [k for k,v in student.unet.state_dict().items() if not torch.equal(v, base.unet.state_dict()[k])]
    assert moved and (recipe=='svd' or all(re.fullmatch(LEARNS, o.removesuffix('.weight')) for o in moved))
    assert 'num_inference_steps=1' in (tmp_path/'out/README.md').read_text()
    argv = ['sample', str(desk/'picture.png'), '--model', str(tmp_path/'out'), '-o', str(tmp_path/'clips')]
    assert main([*argv, '--clips', '2', '--as', 'mp4'])==0
    assert sorted(files(tmp_path/'clips'))==['picture-0.mp4','picture-1.mp4']
    assert load_clip(tmp_path/'clips/picture-1.mp4').shape==(14,3,64,64)


@pytest.mark.slow
def test_a_stopped_run_is_exported_and_resumed(desk, tmp_path):
    """A LoRA run that was stopped resumes to the weights of one that was not;
    what is exported of it lies between base and end"""
    argv = ['distil', '--recipe', 'svd-lora', '--base', 'base', *SMALL, *sets(lora_rank=4)]
    def ask(out):
        resume = ['--resume'] if out.exists() else []
        return sfv(*argv, '--data', 'shards', '-o', out, *resume, cwd=desk)
    script = """if 1:
        import sys
        from sfv_lite import sfv
        from sfv_lite.cli import main
        real = sfv.gradients
        def gradients(s, batch):
            if s.step==2: raise RuntimeError('pulled the plug')
            return real(s, batch)
        sfv.gradients = gradients
        sys.exit(main())"""
    (tmp_path/'cut.py').write_text(script)
    assert ask(tmp_path/'whole').returncode==0
    done = python(tmp_path/'cut.py', *argv, '--data', 'shards', '-o', tmp_path/'cut', cwd=desk)
    assert done.returncode==1 and 'plug' in done.stderr
    assert sfv('export', tmp_path/'cut', '-o', tmp_path/'early', '--dtype', 'fp32', cwd=desk).returncode==0
    other = sfv(*argv, '-o', tmp_path/'cut', '--resume', cwd=desk)
    assert other.returncode==1 and 'data shards, whose clips were others' in other.stderr
    done = ask(tmp_path/'cut')
    assert done.returncode==0, done.stderr
    flat = lambda folder: torch.cat([p.flatten() for p in load_pipeline(folder).unet.parameters()])
    whole,cut,early,base = map(flat, (tmp_path/'whole',tmp_path/'cut',tmp_path/'early',desk/'base'))
    assert torch.equal(whole, cut) and not torch.equal(early, cut) and not torch.equal(early, base)


def test_dtype_variant_decoder_and_chunks(desk, tmp_path):
    """Files named fp16 open; half precision makes nearly the same clip; a tiny decoder takes the VAE's place;
    chunks of whole clips change nothing"""
    from diffusers import AutoencoderTiny
    pipe,half = load_pipeline(desk/'base'),tmp_path/'half'
    save_pipeline(pipe, half, torch.float16, 'fp16')
    assert (half/'unet/diffusion_pytorch_model.fp16.safetensors').is_file()
    assert (half/'image_encoder/model.fp16.safetensors').is_file()
    x = torch.rand(1,3,64,64, generator=torch.Generator().manual_seed(0))*2-1
    noise = torch.randn(1,14,4,8,8, generator=torch.Generator().manual_seed(1))
    from sfv_lite.sampling import sample_once
    def clip(pipe):
        cond = condition(pipe, x, generator=torch.Generator().manual_seed(2))
        return sample_once(Denoiser(pipe.unet).eval(), cond, noise)
    whole = clip(pipe)
    for dtype in (torch.float32,torch.bfloat16):
        other = clip(load_pipeline(half, dtype))
        assert (other-whole).norm()/whole.norm()<(.01 if dtype is torch.float32 else .05)
    assert torch.equal(decode(pipe.vae, whole, 14), decode(pipe.vae, whole))
    assert decode(pipe.vae, whole, 3).shape==(1,14,3,64,64)
    def tiny(*widths, **blocks):
        return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, **blocks)
    tiny(16, 16, 16, 16).save_pretrained(tmp_path/'tiny')
    assert decode(load_decoder(tmp_path/'tiny', pipe), whole, 5).shape==(1,14,3,64,64)
    tiny(16, 16, num_encoder_blocks=(1,1), num_decoder_blocks=(1,1)).save_pretrained(tmp_path/'other')
    with pytest.raises(ValueError, match='factor 2'): load_decoder(tmp_path/'other', pipe)


def test_what_does_not_fit_is_said_in_a_line(desk, tmp_path, capsys, monkeypatch):
    "Another kind of pipeline, mixed files, sizes, frames, a GPU that is not there, memory that is not there"
    monkeypatch.chdir(desk)
    import shutil
    def wrong(name, file, **change):
        path = shutil.copytree('base', tmp_path/name)/file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    wrong('image', 'model_index.json', _class_name='StableDiffusionPipeline')
    wrong('mixed', 'scheduler/scheduler_config.json', prediction_type='epsilon')
    sample = ['sample','picture.png','--model']
    cases = [
        ([*sample,tmp_path/'image'], 'StableDiffusionPipeline'),
        ([*sample,tmp_path/'mixed'], 'prediction_type = epsilon'),
        ([*sample,'base','--height','100'], 'height = 100'),
        ([*sample,'base','--length','15'], 'frames = 15'),
        ([*sample,'base','--device','cuda:99'], '--device cuda:99'),
        ([*sample,'base','--decoder','nowhere'], 'nowhere'),
        ([*sample,'base','--clips','2','-o','a.gif'], 'a.gif'),
        (['export','nowhere','-o','x'], 'nowhere'),
        (['export','base','-o','videos'], 'videos: exists'),
        (['distil','--recipe','svd','--base','digits-teacher','-o','x'], 'frames = 14'),
        (['distil','--recipe','svd','--base','base','-o','x',*sets(height=60)], 'height = 60'),
        ([*sample,'hub:no/such'], 'hub:no/such'),
        (['evaluate','base','-o',tmp_path/'marks'], 'clips of 14 frames')]
    before = files(desk)
    for argv,word in cases:
        assert main([str(o) for o in argv])!=0, argv
        err = capsys.readouterr().err
        assert len(err.splitlines())==1 and word in err, err
    assert files(desk)==before
    import sfv_lite.train
    def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(sfv_lite.train, 'load_pipeline', full)
    assert main(['distil','--recipe','svd','--base','base','-o','x'])==1
    err = capsys.readouterr().err
    assert len(err.splitlines())==1 and 'svd-lora' in err and 'checkpointing' in err


@pytest.mark.slow
@pytest.mark.huge
def test_true_width(tmp_path):
    """The whole of SVD with random weights: saved and opened again as the public checkpoint lies,
    one step of sampling and one step of LoRA training at 64×64 pixels and 14 frames, below 20 GB"""
    script = """if 1:
        import gc, re, sys, time, torch
        from pathlib import Path
        from sfv_lite.runs import make_accelerator
        from sfv_lite.pipelines import clips_of, load_pipeline, save_pipeline
        from sfv_lite.plan import random_batch, network_sizes
        from sfv_lite.recipe import Recipe
        from sfv_lite.sfv import distil_step
        from sfv_lite.train import make_state
        from sfv_lite.svd import svd_pipeline
        out,start = Path(sys.argv[1]),time.time()
        def say(what):
            highest = int(re.search(r'VmHWM:.*?([0-9]+)', open('/proc/self/status').read())[1])/2**20
            print(f"{what}: {time.time()-start:.0f} s, highest {highest:.1f} GB", flush=True)
        pipe = svd_pipeline()
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert [count(o) for o in (pipe.unet,pipe.vae,pipe.image_encoder)]==[1524623082,97742847,632076800]
        first = pipe.unet.conv_in.weight.clone()
        say('built')
        save_pipeline(pipe.to(torch.float16), out/'svd', variant='fp16')
        del pipe
        gc.collect()
        say('saved')
        assert (out/'svd/unet/diffusion_pytorch_model.fp16.safetensors').is_file()
        pipe = load_pipeline(out/'svd')
        assert torch.equal(pipe.unet.conv_in.weight, first.half().float())
        say('opened')
        (_,clip), = clips_of(pipe, torch.zeros(3,64,64), [0])
        assert clip.shape==(14,3,64,64) and clip.isfinite().all()
        say('sampled')
        r = Recipe.load('svd-lora', height=64, width=64, batch=1, accumulation=1, head_start=0, precision='no')
        s = make_state(pipe, r, make_accelerator(r))
        widths = lambda heads: [o.inp.in_channels for o in heads]
        assert widths(s.D.heads.spatial)==widths(s.D.heads.temporal)==[320,640,1280,1280]
        log = distil_step(s, random_batch(network_sizes(), r, 1))
        assert s.step==1 and all(map(torch.isfinite, map(torch.tensor, log.values())))
        say('trained')"""
    (tmp_path/'run.py').write_text(script)
    done = python(tmp_path/'run.py', tmp_path, timeout=3000)
    print(done.stdout)
    assert done.returncode==0, done.stderr[-3000:]
    assert float(done.stdout.split()[-2])<20
