"""What goes wrong without stopping, and what stops at any moment: nothing is lost and nothing silent.
`python tests/test_harm.py [FAULT …]` counts many more tries, for notebook 16d's table nbs/experiments/harm.json"""
import errno, itertools, json, os, pkgutil, random, shutil, signal, sys, tempfile
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest, torch
from conftest import ROOT, TINY, files, recipe, rows_of, sets
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from sfv_lite.checkpoint import Checkpoint, damage, load
from sfv_lite.cli import main
from sfv_lite.files import read_rows
from sfv_lite.inspection import inspect_folder, not_finite
from sfv_lite.loop import Log, loop
from sfv_lite.recipe import Recipe, RecipeError
from sfv_lite.runs import asked_of, claim, make_accelerator
from sfv_lite.train import distil


@pytest.fixture(scope='module')
def shards(base, tmp_path_factory):
    "Three films of three clips each, as shards of four"
    from sfv_lite.files import save_clip
    from sfv_lite.films import Cutting
    from sfv_lite.shards import prepare
    from sfv_lite.video import moving_digits
    folder = tmp_path_factory.mktemp('films')
    for i in range(3):
        x = moving_digits(1, i)[0][0]
        save_clip(torch.cat([x, x.flip(0), x, x.flip(0)])[:27], folder/f'{i}.webm', 7)
    prepare(folder, folder/'shards', base, Cutting(8, 7, 32, 32), workers=0, shard=4)
    return folder/'shards'


def finite(folder):
    "Whether every tensor below a folder is"
    return not not_finite({str(o):list(load_file(o).values()) for o in Path(folder).rglob('*.safetensors')})


def stopped(r, out, base, at=4, by=signal.SIGINT, **more):
    "A run that is interrupted at its fourth batch"
    from sfv_lite.train import digit_batches
    def data(*args):
        for k,batch in enumerate(digit_batches(*args), 1):
            if k==at: signal.raise_signal(by)
            yield batch
    return distil(r, out, base, data, **more)


def steps_kept(out): return sorted(int(o.name) for o in (Path(out)/'state').glob('[0-9]*'))


# numbers ------------------------------------------------------------------------------------------

RATES = {'lr_g=1e6':'distil', 'lr_d=1e30':'distil', 'lam=1e38':'distil', 'teacher_lr=1e30':'pretrain',
    'vae_lr=1e30':'vae'}


@pytest.mark.parametrize('rate', RATES)
def test_a_rate_that_spoils_everything(rate, base, tmp_path, capsys):
    "One line names terms, rates and the last good state; what is on disk is finite, and there is no pipeline"
    verb,out = RATES[rate],tmp_path/'run'
    limits = dict(steps=40, teacher_steps=40, vae_steps=40, save_every=1, bad_steps=3)
    argv = [verb, '-o', str(out), *sets(**{**TINY, **limits}), '--set', rate]
    code = main(argv if verb=='vae' else [*argv, '--base', str(base)])
    said = capsys.readouterr().err
    if code==0: # the numbers stayed finite, if large
        assert rate=='lr_g=1e6' and finite(out)
        return
    last = said.strip().splitlines()[-1]
    assert code==1 and 'not finite' in last and 'Traceback' not in said, said
    assert finite(out) and not (out/'pipeline').exists()
    if 'fault.json' in last:
        report = json.loads((out/'fault.json').read_text())
        assert report['steps'][0]['terms'] and report['rates'] and len(report['steps'])==3
        assert verb=='vae' or report['steps'][0]['clips'], report


def test_resumed_from_the_state_before_the_doubtful_one(base, tmp_path):
    "Weights of a step after which all is infinite are not gone on from"
    r = recipe(steps=6, save_every=1, bad_steps=2, lr_d=1e30)
    with pytest.raises(FloatingPointError): distil(r, tmp_path/'run', base)
    doubtful = [o.parent.name for o in (tmp_path/'run'/'state').rglob('doubtful')]
    assert len(doubtful)==1 and int(doubtful[0])==max(steps_kept(tmp_path/'run'))


def test_a_row_that_is_no_number(base, shards, tmp_path, capsys):
    "A NaN that got into a shard (whose digest was made for it) is named with its film"
    import pyarrow.parquet as pq
    from sfv_lite.shards import _write_shard
    folder = tmp_path/'shards'
    shutil.copytree(shards, folder)
    file = folder/'shard-00000.parquet'
    rows = pq.read_table(file).to_pylist()
    spoilt = np.frombuffer(rows[1]['latents'], '<f2').copy()
    spoilt[7] = np.nan
    rows[1]['latents'] = spoilt.tobytes()
    _write_shard(folder, 'shard-00000', rows, json.loads((folder/'shard-00000.json').read_text()))
    argv = ['distil', '-o', str(tmp_path/'run'), '--base', str(base), '--data', str(folder), *sets(**TINY)]
    assert main(argv)==1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert rows[1]['file'] in said and 'not finite' in said


def test_weights_that_are_none_are_neither_opened_nor_saved(base, tmp_path, capsys):
    from sfv_lite.pipelines import load_pipeline, save_pipeline
    shutil.copytree(base, tmp_path/'mine')
    file = tmp_path/'mine/unet/diffusion_pytorch_model.safetensors'
    weights = load_file(file)
    weights['conv_in.bias'][0] = torch.inf
    save_file(weights, file)
    for argv in (['sample', 'digit:3', '--model', tmp_path/'mine', '-o', tmp_path/'a.gif'],
            ['export', tmp_path/'mine', '-o', tmp_path/'b'], ['distil', '--base', tmp_path/'mine', '-o', tmp_path/'c']):
        assert main(list(map(str, argv)))==1 and 'unet are not finite' in capsys.readouterr().err
    assert sorted(o.name for o in tmp_path.iterdir())==['mine']
    pipe = load_pipeline(base)
    with torch.no_grad(): pipe.unet.conv_in.bias[0] = torch.nan
    with pytest.raises(FloatingPointError): save_pipeline(pipe, tmp_path/'d')


# a toy run that is harmed at every write ----------------------------------------------------------

class Harm(BaseException): pass


def toy(out, steps=7, seed=0):
    "A run with everything that a run has but clips: states, log, recipe, optimiser, average"
    r = Recipe.load('digits', precision='no', accumulation=1, save_every=2, log_every=1, seed=seed)
    acc = make_accelerator(r)
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    ema = EMAModel(model.parameters(), decay=.5)
    model,opt = acc.prepare(model, torch.optim.Adam(model.parameters(), .1))
    with claim('toy', out, r, acc, resume=Path(out,'recipe.json').exists()) as run:
        c = load(Checkpoint(run, ema))
        def step(x):
            loss = (model(x)-1).square().mean()
            acc.backward(loss)
            opt.step()
            opt.zero_grad()
            ema.step(model.parameters())
            return dict(loss=loss.item())
        batches = (torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in itertools.count(c.micro))
        loop(step, batches, steps, c, Log(run))
    return [p.detach().clone() for p in (*model.parameters(), *ema.shadow_params)]


CALLS = ('os.replace', 'os.fsync', 'shutil.rmtree', 'sfv_lite.checkpoint.save_file', 'pathlib.Path.write_text',
    'pathlib.Path.mkdir')


def harmed(out, where, k, harm):
    "Run the toy and let the k-th call of a function do harm; whether there was a k-th"
    real,calls = pkgutil.resolve_name(where),itertools.count()
    def fails(*args, **kwargs):
        if next(calls)==k: raise harm
        return real(*args, **kwargs)
    with patch(where, fails):
        try: toy(out)
        except BaseException as e:
            if harm is not e and e.__cause__ is not harm and 'No space left' not in str(e): raise
            return True
    return False


def every_write(folder, harm, tries=10**6):
    "Harm at every call of every function that writes; how many, and how many came out as if nothing had been"
    whole,counts,good = toy(folder/'whole'),0,0
    for where in CALLS:
        for k in range(tries):
            out = folder/f'{where}-{k}'
            if not harmed(out, where, k, harm()): break
            counts += 1
            again = toy(out) # as a user would: with --resume if there is a run
            rows = [int(o['step']) for o in read_rows(out/'log.csv')]
            good += all(map(torch.equal, again, whole)) and rows==list(range(1,8)) and len(steps_kept(out))<=2
            assert not list((out/'state').glob('.*')), 'something that grows'
            shutil.rmtree(out)
    return counts,good


def full(): return OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('harm', [Harm,full], ids=['killed','disk-full'])
def test_harm_at_every_write(harm, tmp_path, capsys):
    "The run goes on to the same bits from whatever was left"
    counts,good = every_write(tmp_path, harm)
    assert counts==good>=30


def test_power_loss(tmp_path):
    "Before anything gets its name, every byte of it has been flushed"
    flushed,replaced = set(),[]
    real_sync,real_replace = os.fsync,os.replace
    def sync(handle):
        flushed.add(os.fstat(handle).st_ino)
        real_sync(handle)
    def replace(a, b):
        a = Path(a)
        below = [o for o in a.rglob('*') if o.is_file()] if a.is_dir() else [a]
        replaced.extend((str(b), o.stat().st_ino in flushed) for o in below)
        real_replace(a, b)
    with patch('os.fsync', sync), patch('os.replace', replace): toy(tmp_path/'run')
    assert len(replaced)>20 and all(ok for _,ok in replaced), [o for o,ok in replaced if not ok]


# states -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run_folder(base, tmp_path_factory):
    "A stopped run of distil with two states"
    out = tmp_path_factory.mktemp('harm')/'run'
    with pytest.raises(KeyboardInterrupt): stopped(recipe(save_every=2), out, base)
    assert steps_kept(out)==[2,4]
    return out


def identity(out, base):
    r = recipe(save_every=2)
    with claim('distil', out, r, make_accelerator(r), base, resume=True) as run: return run.identity


def flips(folder, who, n, rng):
    "Flip one bit in each file of a state, n times each: tries, and how many were noticed"
    tries = noticed = 0
    for file in sorted(o for o in folder.iterdir() if o.is_file()):
        whole = file.read_bytes()
        for bit in rng.integers(8*len(whole), size=n):
            broken = bytearray(whole)
            broken[bit//8] ^= 1<<(bit%8)
            file.write_bytes(broken)
            tries,noticed = tries+1,noticed+(damage(folder, who)!='')
        file.write_bytes(whole)
    return tries,noticed


def test_a_flipped_bit_is_noticed(run_folder, base, tmp_path):
    shutil.copytree(run_folder, tmp_path/'run')
    tries,noticed = flips(tmp_path/'run/state/000004', identity(tmp_path/'run', base), 8, np.random.default_rng(0))
    assert tries==noticed>=40


@pytest.mark.parametrize('harm', ['average','manifest','missing','seed','empty'])
def test_a_damaged_state_is_passed_over_and_named(harm, run_folder, base, tmp_path, capsys):
    "The run goes on from the state before and ends with the bits of a whole one"
    out = tmp_path/'run'
    shutil.copytree(run_folder, out)
    state = out/'state/000004'
    if harm=='average':
        file,data = state/'ema.safetensors',bytearray((state/'ema.safetensors').read_bytes())
        data[-3] ^= 4
        file.write_bytes(data)
    if harm=='manifest': # as somebody's hand, or a disk, may change it
        said = json.loads((state/'manifest.json').read_text())
        (state/'manifest.json').write_text(json.dumps(said | dict(step=10**9)))
    if harm=='missing': (state/'optimizer.bin').unlink()
    if harm=='empty':
        for o in state.iterdir(): o.unlink()
    if harm=='seed':
        with pytest.raises(KeyboardInterrupt): stopped(recipe(save_every=2, seed=1), tmp_path/'other', base)
        shutil.rmtree(state)
        shutil.copytree(tmp_path/'other/state/000004', state)
    distil(recipe(save_every=2), out, base, resume=True)
    said = capsys.readouterr().err
    name = dict(average='ema.safetensors was changed', manifest='manifest.json was changed',
        missing='optimizer.bin is missing', seed="another run's, with another seed",
        empty='manifest.json cannot be read')[harm]
    assert 'goes on from 000002' in said and name in said, said
    distil(recipe(save_every=2), tmp_path/'whole', base)
    assert files(out/'pipeline')==files(tmp_path/'whole/pipeline')


def test_no_state_is_whole(run_folder, base, tmp_path):
    "Nothing is begun anew by itself"
    out = tmp_path/'run'
    shutil.copytree(run_folder, out)
    for o in (out/'state').iterdir(): (o/'ema.safetensors').write_bytes(b'')
    before = files(out/'state')
    with pytest.raises(ValueError, match='no state that can be used: 000004 .*000002'):
        distil(recipe(save_every=2), out, base, resume=True)
    assert files(out/'state')==before


@pytest.mark.parametrize('harm', ['base','recipe.json gone','recipe.json broken','another key','fewer steps'])
def test_another_run_under_the_same_name(harm, run_folder, base, tmp_path):
    "Refused by name, and not a byte changes"
    out,mine,r = tmp_path/'run',tmp_path/'base',recipe(save_every=2)
    shutil.copytree(run_folder, out)
    shutil.copytree(base, mine)
    resume = True
    if harm=='base':
        weights = load_file(mine/'unet/diffusion_pytorch_model.safetensors')
        weights['conv_in.bias'][0] += 1
        save_file(weights, mine/'unet/diffusion_pytorch_model.safetensors')
        match = 'whose files were others'
    if harm=='recipe.json gone':
        (out/'recipe.json').unlink()
        match,resume,r = 'no recipe.json that says which',False,recipe(lam=9.)
    if harm=='recipe.json broken':
        (out/'recipe.json').write_text('{"verb": "distil"}')
        match = 'does not say what was run'
    if harm=='another key': match,r = 'lam = 0.1, not 0.2',recipe(save_every=2, lam=.2)
    if harm=='fewer steps': match,r = 'steps = 6, not 5',recipe(save_every=2, steps=5, schedule='cosine')
    before = files(out)
    with pytest.raises((ValueError,OSError), match=match if harm!='fewer steps' else 'schedule|steps'):
        distil(r, out, mine, resume=resume)
    assert files(out)==before


def test_what_may_change(run_folder, base, tmp_path):
    "How often a run reports, what it keeps, and how long it goes on where the rate does not depend on that"
    out = tmp_path/'run'
    shutil.copytree(run_folder, out)
    distil(recipe(save_every=1, log_every=2, keep=3, keep_every=4, steps=8), out, base, resume=True)
    assert steps_kept(out)==[4,6,7,8]
    assert len(asked_of(out)['made_with'])==2


# one owner ----------------------------------------------------------------------------------------

def test_a_run_that_goes_on_beyond_its_end(base, tmp_path):
    "Its pipeline from before keeps its name and number, and is not given out for what the run has become"
    from sfv_lite.export import student_of
    out = tmp_path/'run'
    distil(recipe(steps=3), out, base)
    first = files(out/'pipeline')
    with pytest.raises(KeyboardInterrupt, match='step 5 of 6'): stopped(recipe(), out, base, 2, resume=True)
    assert not (out/'pipeline').exists() and files(out/'pipeline-000003')==first
    on,before = student_of(out).unet,student_of(out/'pipeline-000003').unet
    assert not torch.equal(on.conv_in.weight, before.conv_in.weight)
    distil(recipe(), out, base, resume=True)
    distil(recipe(), tmp_path/'whole', base)
    assert files(out/'pipeline')==files(tmp_path/'whole/pipeline')
    with pytest.raises(ValueError, match='6 steps already'): distil(recipe(steps=2), out, base, resume=True)


def test_two_runs_into_one_folder(base, tmp_path):
    "The second is told so at once, and the first does not notice"
    said = []
    def data(*args):
        from sfv_lite.train import digit_batches
        for batch in digit_batches(*args):
            with pytest.raises(FileExistsError, match='another run is writing here') as e:
                distil(recipe(), tmp_path/'run', base, resume=True)
            said.append(e)
            yield batch
    distil(recipe(), tmp_path/'run', base, data)
    assert len(said)>=6 and [int(o['step']) for o in read_rows(tmp_path/'run/log.csv')]==[1,2,3,4,5,6]


@pytest.mark.parametrize('key,value', [('GRADIENT_ACCUMULATION_STEPS','2'), ('DYNAMO_BACKEND','INDUCTOR')])
def test_a_launcher_that_wants_something_else(key, value):
    with patch.dict(os.environ, {f'ACCELERATE_{key}':value}), pytest.raises(RecipeError, match=key):
        make_accelerator(recipe(accumulation=4))


def test_precision_is_the_recipes():
    with patch.dict(os.environ, ACCELERATE_MIXED_PRECISION='bf16'):
        assert make_accelerator(recipe(precision='no')).mixed_precision=='no'
    assert make_accelerator(recipe(precision='no')).gradient_accumulation_steps==1


def test_stopped_within_a_micro_batch(base, tmp_path):
    "Of a step of many micro-batches, on SIGTERM not one more is taken"
    r = recipe(batch=4, accumulation=4)
    with pytest.raises(KeyboardInterrupt, match='stopped after step 1 of 6'):
        stopped(r, tmp_path/'run', base, 6, signal.SIGTERM)
    assert steps_kept(tmp_path/'run')==[1]


def test_once_more(base, tmp_path, capsys):
    "A finished run made again is the same to the bit; one whose weights were touched is not, and the exit code says so"
    distil(recipe(steps=3), tmp_path/'run', base)
    again = ['reproduce', str(tmp_path/'run'), '-o']
    assert main([*again, str(tmp_path/'a')])==0 and 'the same to the bit' in capsys.readouterr().out
    file = tmp_path/'run/pipeline/unet/diffusion_pytorch_model.safetensors'
    weights = load_file(file)
    weights['conv_in.bias'][0] += .5
    save_file(weights, file)
    assert main([*again, str(tmp_path/'b')])==3 and '1 of ' in capsys.readouterr().out
    assert json.loads((tmp_path/'b/reproduced.json').read_text())['worst'].endswith('conv_in.bias')
    assert main([*again, str(tmp_path/'a')])==1 and '--resume' in capsys.readouterr().err


def test_export_only_reads(run_folder, tmp_path):
    "A run that is going on keeps its states and the one that it is writing"
    from sfv_lite.export import export
    out = tmp_path/'run'
    shutil.copytree(run_folder, out)
    for o in ('.part','000002x'): (out/'state'/o).mkdir()
    shutil.copytree(out/'state/000002', out/'state/000001')
    before = files(out)
    export(out, tmp_path/'student')
    assert files(out)==before and (out/'state/.part').is_dir()


def test_weights_beyond_half_precision(base, tmp_path):
    "They are not exported as infinities"
    from sfv_lite.export import export
    shutil.copytree(base, tmp_path/'mine')
    file = tmp_path/'mine/unet/diffusion_pytorch_model.safetensors'
    weights = load_file(file)
    weights['conv_in.bias'][0] = 1e5
    save_file(weights, file)
    with pytest.raises(FloatingPointError, match='unet'): export(tmp_path/'mine', tmp_path/'out', torch.float16)
    assert not (tmp_path/'out').exists()
    export(tmp_path/'mine', tmp_path/'out')


def test_tensors_beside_the_file_that_is_read(base, tmp_path):
    "They are no tensors of the tower; and shards with an index are what their index names"
    from sfv_lite.pipelines import load_pipeline
    folder = tmp_path/'mine'
    shutil.copytree(base, folder)
    file = folder/'image_encoder/model.safetensors'
    weights = load_file(file)
    a,b = (dict(sorted(weights.items())[k::2]) for k in (0,1))
    save_file(a, file)
    save_file(b, folder/'image_encoder/extra.safetensors')
    with pytest.raises(ValueError, match='image_encoder: lacks'): inspect_folder(folder)
    load_pipeline(base).save_pretrained(tmp_path/'shards', max_shard_size='1MB')
    assert len(list((tmp_path/'shards/unet').glob('*.safetensors')))>2
    load_pipeline(tmp_path/'shards')


def test_a_folder_of_mine_is_left(tmp_path, capsys):
    "What was there before a command that is refused is there afterwards"
    (tmp_path/'mine').mkdir()
    for out in ('mine','new'): assert main(['distil', '-o', str(tmp_path/out), '--base', '/nonexistent'])==1
    assert [o.name for o in tmp_path.iterdir()]==['mine'] and not list((tmp_path/'mine').iterdir())


# habits of a session of Python --------------------------------------------------------------------

def test_other_habits(base, tmp_path):
    "A default dtype of float64 and gradients switched off change nothing, and are as they were afterwards"
    from sfv_lite.video import moving_digits
    usual = moving_digits(2)[0]
    distil(recipe(), tmp_path/'usual', base)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert torch.equal(moving_digits(2)[0], usual)
            distil(recipe(), tmp_path/'other', base)
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() is torch.float64
    finally: torch.set_default_dtype(torch.float32)
    assert files(tmp_path/'usual/pipeline')==files(tmp_path/'other/pipeline')


def test_the_environment_is_left_as_it_was(tmp_path, capsys):
    before = dict(os.environ)
    main(['sample', 'nowhere.png', '-o', str(tmp_path/'a.gif')])
    assert dict(os.environ)==before


def test_one_broken_picture_among_many(tmp_path, picture, capsys):
    "The others are made, and the exit code says that not all were; a Mac's shadows are no pictures"
    folder = tmp_path/'pictures'
    folder.mkdir()
    for name in ('a.png','c.png'): shutil.copy(picture, folder/name)
    (folder/'b.png').write_bytes(b'no picture')
    (folder/'._a.png').write_bytes(b'\0\5\26\7')
    assert main(['sample', str(folder), '-o', str(tmp_path/'out')])==3
    assert sorted(o.name for o in (tmp_path/'out').iterdir())==['a.gif','c.gif']
    said = capsys.readouterr().err
    assert 'b.png' in said and '._a' not in said


def test_pictures_of_absurd_size_or_kind(tmp_path, capsys):
    "Before they are decoded; and nothing but the formats that are meant is opened"
    from PIL import Image
    Image.new('L', (13_000,13_000)).save(tmp_path/'large.png')
    (tmp_path/'program.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    for name,why in (('large.png','at most 64 million'),('program.png','none of PNG, JPEG')):
        assert main(['sample', str(tmp_path/name), '-o', str(tmp_path/'a.gif')])==1
        assert why in capsys.readouterr().err


# mutated files ------------------------------------------------------------------------------------

def mutated(data:bytes, rng:random.Random)->bytes:
    "Bytes flipped, cut, doubled, filled"
    data = bytearray(data)
    for _ in range(rng.choice((1,1,1,2,8))):
        at,how = rng.randrange(len(data)),rng.randrange(4)
        if how==0: data[at] ^= 1<<rng.randrange(8)
        elif how==1: del data[at:]
        elif how==2: data[at:at] = data[max(0,at-50):at]
        else: data[at:at+rng.randrange(1,9)] = bytes([rng.choice((0,255,34,123))])*4
        if not data: return b''
    return bytes(data)


def parquet_mutations(shards, tmp, tries, rng):
    "Shards with bytes changed: either refused, or the same clips"
    folder = Path(tmp)/'shards'
    shutil.copytree(shards, folder)
    whole,good = rows_of(folder),0
    for _ in range(tries):
        file = rng.choice(sorted(folder.glob('*.parquet')))
        data = file.read_bytes()
        file.write_bytes(mutated(data, rng))
        try: good += file.read_bytes()==data or rows_of(folder)==whole
        except ValueError as e: good += file.name in str(e)
        file.write_bytes(data)
    return tries,good


def test_mutated_shards(shards, tmp_path):
    tries,good = parquet_mutations(shards, tmp_path, 60, random.Random(0))
    assert tries==good


def json_mutations(folder, names, look, tries, rng):
    "Files of a folder with bytes changed: either as before, or refused in words that name a file"
    good = 0
    for _ in range(tries):
        file = folder/rng.choice(names)
        data = file.read_bytes()
        file.write_bytes(mutated(data, rng))
        try:
            look()
            good += 1 # whatever it says is what is needed
        except (ValueError,OSError) as e: good += folder.name in str(e) or str(folder) in str(e)
        file.write_bytes(data)
    return tries,good


MODEL = 'model_index.json','unet/config.json','vae/config.json','image_encoder/config.json'


def test_mutated_model_folders(base, tmp_path):
    "No module is imported, nothing takes long, and what is wrong is named"
    shutil.copytree(base, tmp_path/'mine')
    before = set(sys.modules)
    tries,good = json_mutations(tmp_path/'mine', MODEL, lambda: inspect_folder(tmp_path/'mine'), 60, random.Random(1))
    assert tries==good and not {o for o in set(sys.modules)-before if not o.startswith(('diffusers','transformers'))}


def test_mutated_recipes(run_folder, base, tmp_path):
    shutil.copytree(run_folder, tmp_path/'run')
    def look():
        with claim('distil', tmp_path/'run', recipe(save_every=2), make_accelerator(recipe()), base, resume=True): pass
    tries,good = json_mutations(tmp_path/'run', ['recipe.json'], look, 60, random.Random(2))
    assert tries==good


FOREIGN = dict(library=dict(unet=['os','system']), module=dict(vae=['evil.module','X']),
    extra=dict(helper=['evil','X']), pipeline=dict(_class_name=['pipeline','X']))


@pytest.mark.parametrize('how', FOREIGN)
def test_no_stranger_is_imported(how, base, tmp_path):
    "A module beside the weights, named in model_index.json"
    folder = tmp_path/'mine'
    shutil.copytree(base, folder)
    for name in ('evil.py','pipeline.py'): (folder/name).write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    index = json.loads((folder/'model_index.json').read_text())
    (folder/'model_index.json').write_text(json.dumps(index | FOREIGN[how]))
    refused = pytest.raises(ValueError, match='model_index.json|not a Stable')
    with patch.object(sys, 'path', [str(folder), *sys.path]), refused:
        from sfv_lite.pipelines import load_pipeline
        load_pipeline(folder)
    assert not (tmp_path/'ran').exists() and 'evil' not in sys.modules


@pytest.mark.parametrize('harm', ['missing','shape','extra','cut'])
def test_tensors_that_do_not_fit(harm, base, tmp_path):
    "A tower that would be made up at random is refused"
    folder = tmp_path/'mine'
    shutil.copytree(base, folder)
    file = folder/'image_encoder/model.safetensors'
    weights = load_file(file)
    name = sorted(weights)[-1]
    if harm=='missing': weights = dict(sorted(weights.items())[:7])
    if harm=='shape': weights[name] = weights[name][...,:1].contiguous()
    if harm=='extra': weights['stranger'] = torch.zeros(1)
    save_file(weights, file)
    if harm=='cut': file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match='image_encoder'): inspect_folder(folder)


def refused_in_a_line(argv, *causes):
    "Whether a command ends with one line that holds one of these words; or succeeds"
    import contextlib, io
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()): code = main(argv)
    last = err.getvalue().strip().splitlines()[-1:] or ['']
    return code==0 or (code in (1,3) and 'Traceback' not in err.getvalue() and any(o in last[0] for o in causes))


def settings_mutations(folder, tries, rng):
    "Recipes with bytes changed: what is readable ends at the base that is not there"
    mine,whole = Path(folder)/'mine.ini',(ROOT/'settings.ini').read_bytes()
    argv = ['plan', '--settings', mine, '--recipe', 'digits', '--base', 'nowhere', '-o', Path(folder)/'p']
    good = 0
    for _ in range(tries):
        mine.write_bytes(mutated(whole, rng))
        good += refused_in_a_line([*map(str, argv)], 'mine.ini', 'recipe', 'nowhere')
    return tries,good


def test_mutated_settings(tmp_path):
    tries,good = settings_mutations(tmp_path, 60, random.Random(3))
    assert tries==good


def picture_mutations(file, folder, tries, rng):
    "A picture is what its bytes say, or no picture; never a traceback"
    from sfv_lite.files import load_image
    mine,whole,good = Path(folder)/'a.png',Path(file).read_bytes(),0
    for _ in range(tries):
        mine.write_bytes(mutated(whole, rng))
        try: x = load_image(mine, (32,32))
        except ValueError as e: good += 'a.png: not a readable picture' in str(e)
        else: good += bool(x.shape==(3,32,32) and x.isfinite().all())
    return tries,good


def test_mutated_pictures(tmp_path, picture):
    tries,good = picture_mutations(picture, tmp_path, 200, random.Random(4))
    assert tries==good


# students that go wrong ---------------------------------------------------------------------------

def warned(out): return {o['kind'] for o in read_rows(out/'warnings.csv')}


def reddish(folder):
    "The digits' teacher, with a decoder that makes red of what is bright"
    from sfv_lite.pipelines import load_pipeline, save_pipeline
    pipe = load_pipeline('digits-teacher')
    with torch.no_grad(): pipe.vae.decoder.time_conv_out.weight[0] *= 2
    return save_pipeline(pipe, folder)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['won','guess','still','tint'])
def test_a_student_that_goes_wrong(how, base, tmp_path, monkeypatch, capsys):
    """Judges who win against a generator that does not learn (and an average that does not move); judges who do not
    learn; a student tied to clips that stand still; one tied to plain grey, which its decoder shows in red"""
    import sfv_lite.health as health
    from sfv_lite import train
    usual = dict(log_every=5, sample_every=10, optimizer='adamw', tap='before', T_g=2, head_width=32)
    make = dict(won=dict(lr_g=0., lr_d=.005, P_mean=-4., P_std=.5, steps=60), guess=dict(lr_g=0., lr_d=0., steps=30),
        still=dict(lr_g=2e-3, lr_d=1e-4, lam=100., steps=60), tint=dict(lr_g=2e-3, lr_d=1e-4, lam=100., steps=60))
    monkeypatch.setitem(health.LIMITS, 'after', 0)
    def data(*args):
        for batch in train.digit_batches(*args):
            if how=='still': batch.latents = batch.latents[:,:1].expand_as(batch.latents).contiguous()
            if how=='tint': batch.latents = 0*batch.latents
            if how=='won': batch.latents = 3*batch.latents # a difference that no judge can miss
            yield batch
    data.held = train.digit_batches.held # digits as they are
    start = dict(won=base, tint=reddish(tmp_path/'reddish')).get(how, 'digits-teacher')
    train.distil(recipe(**usual | make[how]), tmp_path/'run', start, data)
    due = dict(won={'won','idle'}, guess={'guess','idle'}, still={'still'}, tint={'tint'})[how]
    assert due<=warned(tmp_path/'run')
    said = capsys.readouterr().err
    assert all(health.WORDS[k].split('{')[0][:30] in said for k in due) and 'warnings.csv' in said


# many more ----------------------------------------------------------------------------------------

def kills(verb, argv, folder, tries, rng, launch=()):
    "SIGKILL at a random moment, until the command ends by itself; then against a run in one go"
    import subprocess, time
    code = 'import sys; from sfv_lite.cli import main; sys.exit(main())'
    (folder/'cli.py').write_text(code)
    def start(out, resume):
        more = ['--resume'] if resume and verb in ('vae','pretrain','distil') else []
        command = [*(launch or [sys.executable]), str(folder/'cli.py'), *map(str, argv), '-o', str(out), *more]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, start_new_session=True, **quiet)
    begun = time.perf_counter()
    first = start(folder/f'{verb}-whole', False)
    _,err = first.communicate()
    assert first.returncode==0, err[-2000:]
    whole,seconds,good = outcome(folder/f'{verb}-whole'),time.perf_counter()-begun,0
    for k in range(tries):
        out,killed = folder/f'{verb}-{k}',0
        while True:
            p = start(out, (out/'recipe.json').exists())
            try: p.wait(rng.uniform(.3, 1)*seconds if killed<3 else None)
            except subprocess.TimeoutExpired:
                hunt = ['pkill', '-9', '-f', f'{out}($| )'] # a launcher's processes are sessions of their own
                while not subprocess.run(hunt).returncode: time.sleep(.05)
                p.wait()
                killed += 1
                continue
            break
        good += p.returncode==0 and outcome(out)==whole
        shutil.rmtree(out, ignore_errors=True)
    return tries,good


def outcome(out):
    "What a command leaves that does not tell the time"
    keep = '.safetensors','.parquet'
    found = {k:v for k,v in files(out).items() if k.endswith(keep) and 'state/' not in k}
    rows = json.loads((out/'table.json').read_text())['rows'] if (out/'table.json').exists() else []
    return found,[{k:v for k,v in o.items() if k!='seconds'} for o in rows]


def count(names:list[str]):
    "The table of notebook 16d: fault, tries, survived; of these faults, or all"
    import time
    rng,begun,folder = random.Random(0),time.perf_counter(),Path(tempfile.mkdtemp())
    table = ROOT/'nbs/experiments/harm.json'
    rows = {o['fault']:o for o in json.loads(table.read_text())}
    for fault,(how,find) in faults(folder, rng).items():
        if names and fault not in names: continue
        tries,good = find()
        rows[fault] = dict(fault=fault, injected=how, tries=tries, survived=good)
        print(rows[fault], round(time.perf_counter()-begun), 's', file=sys.stderr, flush=True)
        table.write_text(json.dumps([*rows.values()], indent=1)+'\n')


def faults(folder, rng):
    "Fault: how it is injected, and what tries it"
    from PIL import Image
    from sfv_lite.files import save_clip
    from sfv_lite.films import Cutting
    from sfv_lite.pipelines import save_pipeline
    from sfv_lite.shards import prepare
    from sfv_lite.svd import digits_pipeline
    from sfv_lite.video import moving_digits, to_uint8
    base = save_pipeline(digits_pipeline(), folder/'base')
    clips = [moving_digits(1, i)[0][0] for i in range(3)]
    (folder/'films').mkdir()
    for i,x in enumerate(clips):
        save_clip(torch.cat([x, x.flip(0), x, x.flip(0)])[:27], folder/'films'/f'{i}.webm', 7)
    Image.fromarray(to_uint8(clips[0][0]).transpose(1,2,0)).save(folder/'seven.png')
    prepare(folder/'films', folder/'shards', base, Cutting(8, 7, 32, 32), workers=0, shard=4)
    run = folder/'run'
    with pytest.raises(KeyboardInterrupt): stopped(recipe(save_every=2), run, base)
    def look():
        with claim('distil', run, recipe(save_every=2), make_accelerator(recipe()), base, resume=True): pass
    steps = dict(steps=10, teacher_steps=10, vae_steps=12, save_every=2)
    few = sets(**{**TINY, **steps, **dict(clips=8, batch=2, teacher_batch=2, vae_batch=2)})
    verbs = dict(
        distil=['distil', '--base', base, *few], pretrain=['pretrain', '--base', base, *few], vae=['vae', *few],
        prepare=['prepare', folder/'films', '--base', base, '--shard', 1, '--workers', 0],
        evaluate=['evaluate', 'digits', 'digits-teacher', '--clips', 64])
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    writes,changed = 'at every call that writes, in a run of one weight','bytes flipped, cut, doubled, filled'
    moments = 'SIGKILL at random moments, up to three times'
    killed = lambda verb,launch=(): lambda: kills(verb, verbs[verb], folder, 20, rng, launch)
    return {
        'killed':(writes, lambda: every_write(folder/'a', Harm)),
        'disk full':(writes, lambda: every_write(folder/'b', full)),
        'a bit flips':('in each file of a state, 50 times',
            lambda: flips(run/'state/000004', identity(run, base), 50, np.random.default_rng(0))),
        'a shard changes':(changed, lambda: parquet_mutations(folder/'shards', folder/'c', 2000, rng)),
        'recipe.json changes':(changed, lambda: json_mutations(run, ['recipe.json'], look, 2000, rng)),
        'a model folder changes':(f'{changed}, in its JSON files',
            lambda: json_mutations(base, MODEL, lambda: inspect_folder(base), 2000, rng)),
        'settings.ini changes':(changed, lambda: settings_mutations(folder, 2000, rng)),
        'a picture changes':(changed, lambda: picture_mutations(folder/'seven.png', folder, 2000, rng)),
        **{f'{verb} is killed':(moments, killed(verb)) for verb in verbs},
        **{f'{verb} is killed, two processes':(moments, killed(verb, two)) for verb in ('distil','pretrain')}}


if __name__=='__main__': count(sys.argv[1:])
