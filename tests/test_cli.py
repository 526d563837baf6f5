"Every verb of `sfv-lite`, with good input and with bad"
import json, shutil, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import TINY, files, python, sets, sfv
from sfv_lite.cli import main, parser
from sfv_lite.files import load_clip, load_image
from sfv_lite.pipelines import load_pipeline
from sfv_lite.recipe import Recipe
from sfv_lite.video import moving_digits, to_uint8

VERBS = list(next(o for o in parser()._actions if hasattr(o,'choices') and o.choices).choices)
QUICK = sets(**{**TINY, 'clips':8, 'vae_steps':2, 'vae_batch':2, 'teacher_steps':2, 'steps':2, 'sample_every':2})


def run(argv):
    "`main` in this process → exit code"
    try: return main([str(o) for o in argv])
    except SystemExit as e: return e.code


# good input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('verb', VERBS)
def test_help(verb, capsys):
    "Each verb explains itself, and shares --seed, -o and --debug with all others"
    assert run([verb, '--help'])==0
    said = capsys.readouterr()
    assert all(o in said.out for o in ('--seed','-o','--debug',f'sfv-lite {verb}')) and not said.err


def test_script_is_installed():
    "The command itself, beside Python, tells its version"
    script = Path(sys.executable).with_name('sfv-lite')
    if not script.exists(): pytest.skip("sfv_lite is not installed in this environment")
    assert python(script, '--version').stdout.startswith('sfv-lite ')


def test_demo(tmp_path):
    """The demo writes a moving picture, a sheet for print and its figures, and prints them as a table:
    50 network evaluations against 1"""
    done = sfv('demo', '-o', tmp_path/'new/demo', '--clips', 2)
    assert done.returncode==0, done.stderr
    out = tmp_path/'new/demo'
    assert sorted(o.name for o in out.iterdir())==['demo.gif','demo.json','demo.png']
    assert len(load_clip(out/'demo.gif'))==8 and load_image(out/'demo.png').shape[0]==3
    rows = json.loads((out/'demo.json').read_text())
    assert [(o['steps'],o['network evaluations']) for o in rows]==[(25,50),(1,1),(1,1)]
    assert rows[0]['seconds']>rows[2]['seconds']>0
    assert all(f"| {o['clips by']} " in done.stdout for o in rows) and str(out/'demo.gif') in done.stdout


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "One digit as PNG in many of the ways that files hold pictures: name → the mode that Pillow shall find in the file"
    folder = tmp_path_factory.mktemp('album')
    rgb,other = (Image.fromarray(o.transpose(1,2,0)) for o in to_uint8(moving_digits(2, split='test')[0][:,0]))
    grey = rgb.convert('L')
    rgb.save(folder/'rgb.png')
    grey.save(folder/'grey.png')
    rgb.convert('RGBA').save(folder/'rgba.png')
    grey.convert('LA').save(folder/'la.png')
    Image.fromarray(np.array(grey).astype('uint16')*257).save(folder/'deep.png')
    rgb.quantize(256).save(folder/'palette.png')
    rgb.convert('1').save(folder/'bits.png')
    rgb.save(folder/'moving.gif', save_all=True, append_images=[other])
    return folder,dict(rgb='RGB', grey='L', rgba='RGBA', la='LA', deep='I;16', palette='P', bits='1', moving='P')


def test_all_kinds_of_pictures_are_read(album):
    "Grey, with alpha, 16 bits, palette, black and white, moving (then its first frame): all are the same digit"
    folder,modes = album
    rgb = load_image(folder/'rgb.png')
    for file in folder.iterdir():
        assert Image.open(file).mode in (modes[file.stem], 'L'), file # Pillow writes a grey GIF as L
        x = load_image(file)
        assert x.shape==(3,32,32) and x.dtype==torch.float32 and -1<=x.min() and x.max()<=1
        assert (x-rgb).abs().mean() < (.3 if file.stem=='bits' else .02), file
    clear = Image.new('RGBA', (32,32), (0,0,0,0))
    clear.save(folder.parent/'clear.png')
    assert (load_image(folder.parent/'clear.png')==1).all(), "what is see-through lies on white"


def test_sample_a_folder(album, base, tmp_path):
    """A folder of all kinds of pictures becomes a folder of clips, one a picture, under the pictures' names;
    pictures of another size and shape are fitted"""
    folder,modes = shutil.copytree(album[0], tmp_path/'album'),album[1]
    Image.open(folder/'rgb.png').resize((90,50)).save(folder/'wide.jpg')
    done = sfv('sample', folder, '-o', tmp_path/'clips', '--model', base)
    assert done.returncode==0, done.stderr
    assert sorted(files(tmp_path/'clips'))==sorted(f'{o}.gif' for o in [*modes,'wide'])
    assert all(load_clip(o).shape==(8,3,32,32) for o in (tmp_path/'clips').iterdir())
    assert done.stdout.split()==[str(tmp_path/'clips'/f'{o.stem}.gif') for o in sorted(folder.iterdir())]


def test_sample_a_picture(picture, tmp_path, capsys):
    """With the shipped student: the same seed gives the same bytes, another seed or more steps other ones;
    GIF and MP4 hold the same clip"""
    def sample(name, *more):
        assert run(['sample', picture, '-o', tmp_path/'deep/er'/name, *more])==0, capsys.readouterr().err
        return (tmp_path/'deep/er'/name).read_bytes()
    first = sample('a.gif')
    assert sample('b.gif')==first and sample('a.gif')==first
    assert sample('c.gif', '--seed', 1)!=first!=sample('d.gif', '--steps', 2, '--guidance', 2)
    sample('a.mp4')
    gif,mp4 = (load_clip(tmp_path/'deep/er'/o) for o in ('a.gif','a.mp4'))
    assert gif.shape==mp4.shape==(8,3,32,32) and (gif-mp4).abs().mean()<.15


def test_sample_a_digit(base, tmp_path, monkeypatch, capsys):
    "digit:1503, the first held-out ones, is drawn by the package itself; with no -o the clip is ./clip.gif"
    monkeypatch.chdir(tmp_path)
    argv = ['sample', 'digit:1503', '--model', base]
    assert run(argv)==0
    assert list(files(tmp_path))==['clip.gif'] and capsys.readouterr().out.strip()=='clip.gif'
    assert run([*argv, '-o', 'clip.mp4'])==0 and len(load_clip('clip.mp4'))==8
    assert run([*argv, '--as', 'webm', '--height', 64, '--width', 64])==0 and load_clip('clip.webm').shape==(8,3,64,64)
    Path('clips.v2').mkdir()
    assert run([*argv, '-o', 'clips.v2'])==0 and list(files(tmp_path/'clips.v2'))==['digit-1503.gif']
    assert run([*argv, '-o', 'exp1.5'])==0 and list(files(tmp_path/'exp1.5'))==['digit-1503.gif']


def test_a_folder_of_pictures_into_a_folder_with_a_dot(base, picture, tmp_path):
    "What looks like an ending, and is none of a video, belongs to the folder's name"
    (tmp_path/'in').mkdir()
    Image.open(picture).save(tmp_path/'in'/'a.b.png')
    for out in ('exp1.5','out.final','v2.png'):
        assert run(['sample', tmp_path/'in', '--model', base, '-o', tmp_path/out])==0
        assert list(files(tmp_path/out))==['a.b.gif']
    assert run(['sample', tmp_path/'in', '--model', base, '-o', tmp_path/'clip.mp4'])==1 # there it may be a slip


@pytest.mark.slow
def test_three_runs_and_a_clip(tmp_path):
    """vae → pretrain → distil → sample, each from the run folder of the one before, each run with its recipe,
    log, state, picture and a pipeline that opens"""
    before,quick = None,Recipe.load('digits', **dict(o.split('=') for o in QUICK[1::2]))
    for verb in ('vae','pretrain','distil'):
        done = sfv(verb, '-o', tmp_path/verb, *QUICK, *(['--base', before] if before else []))
        assert done.returncode==0, done.stderr
        assert done.stdout.strip()==str(tmp_path/verb/'pipeline')
        made = {o.name for o in (tmp_path/verb).iterdir()}
        looked = {'samples','averages','validation.csv'} if verb!='vae' else set()
        assert made=={'.lock','recipe.json','log.csv','state','pipeline'} | looked
        asked = json.loads((tmp_path/verb/'recipe.json').read_text())
        assert asked.items() >= {**vars(quick), 'verb':verb, 'base':before and str(before)}.items()
        before = tmp_path/verb
    vae,teacher,student = (load_pipeline(tmp_path/o) for o in ('vae','pretrain','distil'))
    assert teacher.vae.config.scaling_factor==vae.vae.config.scaling_factor!=1
    same = lambda a,b: all(torch.equal(x,y) for x,y in zip(a.parameters(), b.parameters(), strict=True))
    assert same(vae.vae, student.vae) and same(vae.image_encoder, student.image_encoder)
    assert not same(vae.unet, teacher.unet) and not same(teacher.unet, student.unet)
    assert load_clip(next((tmp_path/'distil/samples').glob('*.gif'))).shape[0]==8
    assert run(['sample', 'digit:3', '--model', before, '-o', tmp_path/'clip.gif'])==0


@pytest.mark.slow
def test_bench(base, tmp_path):
    "Figures of a training step, memory, a clip and start-up, as JSON and as tables"
    done = sfv('bench', '-o', tmp_path/'bench.json', '--base', base, *sets(batch=2))
    assert done.returncode==0, done.stderr
    result = json.loads((tmp_path/'bench.json').read_text())
    assert {'a training step','memory','one clip','start-up'} <= set(result)
    assert all(f'\n{k}\n' in done.stdout for k in result)
    assert all(o['seconds']>0 for k in ('a training step','one clip') for o in result[k])
    assert .1<result['memory'][0]['peak resident GB after these steps']<4


# bad input ----------------------------------------------------------------------------------------

@pytest.fixture
def desk(tmp_path, monkeypatch, picture, base):
    "A working directory with a clip from earlier and things that cannot be used"
    monkeypatch.chdir(tmp_path)
    shutil.copy(picture, 'good.png')
    Path('clip.gif').write_bytes(b'an earlier clip')
    Path('broken.png').write_text('no picture')
    Path('cut.png').write_bytes(picture.read_bytes()[:-picture.stat().st_size//3])
    Path('empty').mkdir()
    Path('album').mkdir()
    shutil.copy(picture, 'album/good.png')
    Path('album/torn.png').write_bytes(Path('cut.png').read_bytes())
    Path('odd.ini').write_text('[digits\nsteps = 1')
    shutil.copytree(base, 'blind', ignore=shutil.ignore_patterns('vae'))
    weights = Path(shutil.copytree(base, 'torn'))/'unet/diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return tmp_path


def complains(code, err, *words):
    "Failed, with exactly one line that names the thing"
    assert code not in (0,None)
    assert len(err.splitlines())==1 and err.endswith('\n'), err
    assert err.startswith('sfv-lite') and 'Traceback' not in err, err
    assert all(o in err for o in words), err


DISTIL = ['distil', '--base', 'BASE', '-o', 'run', *QUICK]
BAD = {
    'no verb': ([], 'VERB'),
    'unknown verb': (['dream'], 'dream'),
    'unknown option': (['sample', 'good.png', '--frames', 3], '--frames'),
    'no picture': (['sample', 'nowhere.png'], 'nowhere.png', 'no such file'),
    'broken picture': (['sample', 'broken.png'], 'broken.png'),
    'truncated picture': (['sample', 'cut.png'], 'cut.png'),
    'empty folder': (['sample', 'empty', '-o', 'clips'], 'empty', 'no pictures'),
    'folder into a file': (['sample', 'album', '-o', 'clip.gif'], 'clip.gif', 'folder'),
    'digit out of range': (['sample', 'digit:9999'], 'digit:9999', '1796'),
    'digit no number': (['sample', 'digit:seven'], 'digit:seven'),
    'unknown file type': (['sample', 'good.png', '-o', 'clip.txt'], 'clip.txt', '.gif'),
    'kind and file at odds': (['sample', 'good.png', '-o', 'clip.gif', '--as', 'mp4'], 'clip.gif', '--as mp4'),
    'guidance of one step': (['sample', 'good.png', '--guidance', 3], '--guidance 3', '--steps'),
    'a VAE of a recipe without one': (['vae', '--recipe', 'svd', '-o', 'run'], '[svd]', 'vae_steps'),
    'a large recipe on a small base': (
        ['prepare', 'album', '--recipe', 'svd', '-o', 'shards'], 'frames = 14', 'at most 8'),
    'shards among the videos': (['prepare', 'album', '-o', 'album'], 'album', 'folder of their own'),
    'steps 0': (['sample', 'good.png', '--steps', 0], '--steps', "'0'"),
    'steps -1': (['sample', 'good.png', '--steps', '-1'], '--steps', "'-1'"),
    'steps in words': (['sample', 'good.png', '--steps', 'ten'], '--steps', "'ten'"),
    'motion bucket out of range': (['sample', 'good.png', '--motion-bucket', 256], '--motion-bucket', '256'),
    'negative noise': (['sample', 'good.png', '--noise-aug', '-1'], '--noise-aug', '-1'),
    'no such model': (['sample', 'good.png', '--model', 'digitz'], 'digitz', 'digits-teacher'),
    'model without a VAE': (['sample', 'good.png', '--model', 'blind'], 'blind', 'vae'),
    'model with truncated weights': (['sample', 'good.png', '--model', 'torn'], 'torn'),
    'output below a file': (['sample', 'good.png', '-o', 'clip.gif/clip.gif'], 'clip.gif:'),
    'demo below a file': (['demo', '-o', 'clip.gif/demo'], 'clip.gif', 'irectory'),
    'demo of nothing': (['demo', '-o', 'demo', '--clips', 0], '--clips', "'0'"),
    'run below a file': (['distil', '--base', 'BASE', '-o', 'clip.gif/run', *QUICK], 'clip.gif', 'irectory'),
    'unknown recipe': (['distil', '--recipe', 'digitz', '-o', 'run'], '[digitz]', '[digits]'),
    'unknown key': (['distil', '--set', 'stepz=3', '-o', 'run'], 'stepz', 'steps?'),
    'wrong type': (['pretrain', '--set', 'teacher_steps=ten', '-o', 'run'], 'teacher_steps = ten', 'whole number'),
    'out of range': (['vae', '--set', 'vae_steps=0', '-o', 'run'], 'vae_steps = 0', 'at least 1'),
    'negative': (['distil', '--set', 'steps=-1', '-o', 'run'], 'steps = -1', 'at least 1'),
    'not a choice': (['distil', '--set', 'optimizer=adam', '-o', 'run'], 'optimizer = adam', 'sm3 or adamw'),
    'no value': (['distil', '--set', 'steps', '-o', 'run'], 'steps', 'KEY=VALUE'),
    'fewer clips than micro-batches': ([*DISTIL, *sets(batch=2, accumulation=4)], 'batch = 2', 'accumulation'),
    'micro-batches of unequal size': ([*DISTIL, *sets(batch=4, accumulation=3)], 'batch = 4', 'accumulation'),
    'no settings': (['distil', '--settings', 'nowhere.ini', '-o', 'run'], 'nowhere.ini'),
    'settings out of order': (['distil', '--settings', 'odd.ini', '-o', 'run'], 'odd.ini'),
    'no base': (['distil', '--base', 'nowhere', '-o', 'run', *QUICK], 'nowhere', 'digits-teacher'),
    'no base to pretrain on': (['pretrain', '--base', 'nowhere', '-o', 'run', *QUICK], 'nowhere', 'digits-teacher'),
    'no base to measure': (['bench', '--base', 'nowhere'], 'nowhere', 'digits-teacher'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case, desk, base, capsys):
    """One line on stderr names what is wrong, the exit code is not 0, and every file is as it was:
    nothing lost, nothing half written"""
    argv,*words = BAD[case]
    before = files(desk)
    code = run([base if o=='BASE' else o for o in argv])
    complains(code, capsys.readouterr().err, *words)
    assert files(desk)==before


def test_bad_input_in_a_fresh_process(desk):
    "The same in a process of its own, so that nothing the libraries print while they open a pipeline is missed"
    before = files(desk)
    done = sfv('sample', 'good.png', '--model', 'torn', cwd=desk)
    complains(done.returncode, done.stderr, 'torn')
    assert not done.stdout and files(desk)==before


def test_debug_shows_where(desk):
    "--debug gives the traceback instead of the line"
    done = sfv('distil', '--set', 'stepz=3', '--debug', cwd=desk)
    assert done.returncode!=0 and 'Traceback' in done.stderr and 'stepz' in done.stderr


def test_the_same_clip_is_the_same_file(tmp_path):
    "Ten files of one clip do not differ (x264's look-ahead made seventeen kinds of a hundred and twenty)"
    from sfv_lite.files import save_clip
    from sfv_lite.video import moving_digits
    x = moving_digits(4, seed=1)[0].flatten(0,1).repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert len({save_clip(x, tmp_path/f'{k}.mp4').read_bytes() for k in range(10)})==1
