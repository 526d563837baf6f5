"Videos to shards: every file that is wrong, every way to be stopped, and training from what was made"
import errno, itertools, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
import av, numpy as np, pytest, torch
from conftest import TINY, files, python, recipe, rows_of, sets, sfv
from sfv_lite.cli import main
from sfv_lite.files import load_clip, save_clip
from sfv_lite.films import Cutting, clips_of
from sfv_lite.files import locked
from sfv_lite.shards import prepare
from sfv_lite.pipelines import load_pipeline
from sfv_lite.stream import Clips, Turns, for_training, held_films, load_manifest, shard_batches
from sfv_lite.train import distil
from sfv_lite.video import moving_digits, to_uint8

SPEC = Cutting(8, 7, 32, 32)
WRONG = {'nothing.mp4':'is empty', 'notes.mp4':'not a readable video', 'cut off.mp4':'not a readable video',
    'deep/er/sound.mp4':'has sound but no picture', 'wink.webm':'too short'}


def write(path, x, fps=7):
    "Frames `(t 3 h w)` in whatever container the name asks for"
    if path.suffix in ('.mp4','.webm','.gif'): return save_clip(x, path, fps)
    with av.open(str(path), 'w') as out:
        s = out.add_stream('mpeg4' if path.suffix=='.avi' else 'libx264', rate=fps)
        s.height,s.width,s.pix_fmt = *x.shape[-2:],'yuv420p'
        for o in to_uint8(x.permute(0,2,3,1)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(o), format='rgb24')
            out.mux(s.encode(frame))
        out.mux(s.encode())


def write_sound(path):
    with av.open(str(path), 'w') as out:
        tone = out.add_stream('aac', rate=48000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1,48000), np.float32), format='fltp', layout='mono')
        wave.rate = 48000
        for o in (wave,None): out.mux(tone.encode(o))


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """Six videos of 27 frames without a cut, so of three clips each, in several containers,
    with blanks and umlauts in their names and folders in folders"""
    folder = tmp_path_factory.mktemp('good')/'my vidéos'
    for i,name in enumerate(('a b.mp4', 'Größe.webm', 'deep/er/数字.mkv', 'deep/plain.mov', 'loop.gif', "it's.avi")):
        x = moving_digits(1, i)[0][0]
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        write(folder/name, torch.cat([x, x.flip(0), x, x.flip(0)])[:27])
    return folder


@pytest.fixture(scope='module')
def mixed(tmp_path_factory, good):
    "The same beside six files that are no use"
    folder = tmp_path_factory.mktemp('mixed')
    for name,o in files(good).items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(o)
    (folder/'nothing.mp4').touch()
    (folder/'notes.mp4').write_text('no video')
    (folder/'readme.txt').write_text('no video either')
    (folder/'.hidden').write_text('not meant')
    (folder/'cut off.mp4').write_bytes((good/'a b.mp4').read_bytes()[:2000])
    write_sound(folder/'deep/er/sound.mp4')
    save_clip(moving_digits(1)[0][0,:3], folder/'wink.webm', fps=7)
    return folder


@pytest.fixture(scope='module')
def shards(tmp_path_factory, good, base):
    "All of the good videos as shards of five clips"
    out = tmp_path_factory.mktemp('shards')/'shards'
    report = prepare(good, out, base, SPEC, workers=0, shard=5)
    assert (report['clips'],report['shards'],report['refused'])==(18,4,[])
    return out


@pytest.fixture(scope='module')
def flat(tmp_path_factory, good, base):
    "The same videos as clips of another length and shape"
    out = tmp_path_factory.mktemp('flat')/'flat'
    assert prepare(good, out, base, Cutting(6, 7, 16, 32), workers=0)['clips']==24
    return out


def process(rank=0, world=1):
    "What of accelerate's accelerator is looked at"
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device('cpu'))


def only(folder):
    "What of a folder must be the same however it was made"
    return {k:v for k,v in files(folder).items() if k.startswith('shard-') or k=='manifest.json'}


# files that are wrong -----------------------------------------------------------------------------

def test_every_wrong_file_is_reported_once(mixed, base, tmp_path, capsys):
    """Each with its reason, in the report and on the screen; the others are used, and the exit code is 3.
    A text file is passed over and counted"""
    assert main(['prepare', str(mixed), '-o', str(tmp_path/'out'), '--base', str(base)])==3
    report = json.loads((tmp_path/'out/report.json').read_text())
    assert report['clips']==18 and report['files']==12
    refused = {str(Path(o['file']).relative_to(mixed)):o['reason'] for o in report['refused']}
    assert len(report['refused'])==len(refused) and set(refused)==set(WRONG)
    assert all(refused[k].startswith(v) for k,v in WRONG.items()), refused
    said = capsys.readouterr().out
    assert report['passed']=={'.txt':1} and '1 × .txt' in said
    assert all(k in said for k in WRONG) and (tmp_path/'out/sheet.png').stat().st_size>1000


@pytest.mark.parametrize('kind,cause', [('avi','ends after'), ('mkv','ends after'), ('gif','damaged after')])
def test_a_file_that_breaks_off_keeps_its_clips(kind, cause, tmp_path):
    """A container that can be read from the front, of which the last third is missing:
    what is there is used, and the file is reported"""
    write(tmp_path/f'whole.{kind}', moving_digits(12, 3)[0].flatten(0,1))
    whole = (tmp_path/f'whole.{kind}').read_bytes()
    (tmp_path/f'part.{kind}').write_bytes(whole[:len(whole)*2//3])
    *clips,became = clips_of(tmp_path/f'part.{kind}', SPEC)
    assert 2<=len(clips)<11 and became.reason.startswith(cause), became


def test_no_clip_crosses_a_cut(base, tmp_path):
    "Black on white follows white on black after 12 frames: one clip of 8 from each side, none from the middle"
    x,_ = moving_digits(2, 1)
    x = torch.cat([x,x.flip(1)], 1)[:,:12]
    save_clip(torch.cat([x[0],-x[1]]), tmp_path/'cut.mp4', fps=7)
    *found,became = clips_of(tmp_path/'cut.mp4', SPEC)
    found = [clip for _,clip in found]
    assert [clip.mean()>128 for clip in found]==[False,True]
    assert all(np.ptp(clip.mean((1,2,3)))<60 for clip in found) and became.cuts==1


def test_prepare_where_the_videos_are(good, base, tmp_path, monkeypatch, capsys):
    """In the folder of videos, shards go to ./shards; the same command goes on, and does not take them for videos.
    Other files of the same number under the same folder are noticed, and so is a manifest that somebody broke"""
    monkeypatch.chdir(shutil.copytree(good, tmp_path/'videos'))
    command = ['prepare', '.', '--base', str(base), '--workers', '0', '--set', 'fps=7']
    assert main(command)==0 and '6 files' in capsys.readouterr().out
    before = files(Path('shards'))
    assert main(command)==0 and '6 files' in capsys.readouterr().out and files(Path('shards'))==before
    Path('a b.mp4').rename('c.mp4')
    assert main(command)==1 and 'files = 6 (' in capsys.readouterr().err and files(Path('shards'))==before
    Path('shards/manifest.json').write_text('{')
    assert main(command)==1 and 'manifest.json: cannot be read' in capsys.readouterr().err


def test_dry_run_writes_a_sheet_and_no_shards(mixed, tmp_path, capsys):
    """It counts clips and names wrong files like the real run, and leaves a sheet of clips beside the folder of shards,
    which is not made"""
    assert main(['prepare', str(mixed), '-o', str(tmp_path/'out'), '--dry-run'])==3
    said = capsys.readouterr().out
    assert '18 clips' in said and all(k in said for k in WRONG)
    assert os.listdir(tmp_path)==['out-dry-run.png'] and (tmp_path/'out-dry-run.png').stat().st_size>10_000


# being stopped ------------------------------------------------------------------------------------

def test_killed_again_and_again(good, base, shards, tmp_path):
    """SIGKILL at random points; each time the same command goes on,
    and in the end the shards are those of an undisturbed run"""
    out,chance = tmp_path/'out',random.Random(0)
    code = dedent(f"""\
        from sfv_lite.films import Cutting
        from sfv_lite.shards import prepare
        import torch
        torch.set_num_threads(1)
        prepare({str(good)!r}, {str(out)!r}, {str(base)!r}, Cutting(8,7,32,32), workers={{}}, shard=5)""")
    script = tmp_path/'prepare.py'
    for k in range(6):
        script.write_text(code.format(k%3)) # a plain script, without a guard
        p = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
        before = set(files(out)) if out.exists() else set()
        while p.poll() is None and not (out/'.lock').exists(): time.sleep(.02)
        time.sleep(chance.uniform(0, 2))
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        left = set(files(out))
        assert before-{o for o in before if '.part' in o} <= left, "a finished file disappeared"
    assert python(script).returncode==0
    assert only(out)==only(shards)
    assert not [o for o in files(out) if o.endswith('.part')]


def test_ctrl_c(good, base, tmp_path):
    "One line, exit code 130, and nothing but whole shards"
    code = 'import sys; from sfv_lite.cli import main; sys.exit(main())'
    argv = ['prepare', str(good), '-o', str(tmp_path/'out'), '--base', str(base), '--shard', '2']
    ask = [sys.executable, '-c', code, *argv]
    p = subprocess.Popen(ask, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while p.poll() is None and not list((tmp_path/'out').glob('shard-*.json')): time.sleep(.02)
    os.killpg(p.pid, signal.SIGINT) # as a terminal does: to the decoders too
    said = p.communicate(timeout=60)[1]
    assert p.returncode in (130,0) and 'Traceback' not in said, said
    assert not [o for o in files(tmp_path/'out') if o.endswith('.part')]


def test_no_space_left(good, base, shards, tmp_path, monkeypatch, capsys):
    "A disk that is full at the second shard: one line, what was whole stays, and with space the run goes on"
    import pyarrow.parquet as pq
    made,whole = [],pq.ParquetWriter
    class Full(whole):
        def write_table(self, table):
            made.append(table)
            if len(made)==2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'shard-00001.parquet')
            super().write_table(table)
    monkeypatch.setattr(pq, 'ParquetWriter', Full)
    argv = ['prepare', str(good), '-o', str(tmp_path/'out'), '--base', str(base), '--shard', '5']
    assert main(argv)==1
    said = capsys.readouterr().err.strip()
    assert 'No space left' in said and 'shard-00001' in said.splitlines()[-1]
    assert sorted(o for o in files(tmp_path/'out') if 'shard' in o)==['shard-00000.json','shard-00000.parquet']
    monkeypatch.setattr(pq, 'ParquetWriter', whole)
    assert main(argv)==0
    assert only(tmp_path/'out')==only(shards)


def test_a_second_prepare_refuses(good, base, tmp_path):
    "As long as one works on a folder, another one is turned away; afterwards it may"
    with locked(tmp_path/"out", "prepare"):
        done = sfv('prepare', good, '-o', tmp_path/'out', '--base', base)
        assert done.returncode==1 and 'another prepare is writing here' in done.stderr
        assert files(tmp_path/'out').keys()<={'.lock'}
    assert sfv('prepare', good, '-o', tmp_path/'out', '--base', base).returncode==0


def test_another_command_on_the_same_folder(good, base, shards, capsys):
    "Going on with another size is refused, by name and value"
    before = only(shards)
    assert main(['prepare', str(good), '-o', str(shards), '--base', str(base), '--shard', '5', '--set', 'fps=5'])==1
    assert 'fps = 7, not 5' in capsys.readouterr().err
    assert only(shards)==before


# training from shards -----------------------------------------------------------------------------

@pytest.mark.parametrize('world', [1,2,3,5])
@pytest.mark.parametrize('sizes', [(16,2), (5,5,5,3), (18,), (1,)*18])
def test_equal_shares(sizes, world):
    "However clips lie in shards, all processes get as many in an epoch, none twice, and every clip in some epoch"
    note = lambda n: dict(rows=n, group=4, films=[['a',n]], pieces=['']*(n//4+2))
    clips = Clips('shards', dict(shards={str(k):note(n) for k,n in enumerate(sizes)}), lambda film: True)
    seen = set()
    for epoch in range(20):
        dealt = [np.concatenate(clips.order(0, epoch, rank, world, 4)).tolist() for rank in range(world)]
        assert [len(o) for o in dealt]==[18//world]*world
        assert len(flat := {i for o in dealt for i in o})==18//world*world
        seen |= flat
    assert seen==set(range(18))


def test_films_are_held_out_whole():
    "As many clips as are asked for at least, never all films, and the same ones whatever else there is"
    note = dict(rows=30, group=16, pieces=[''], films=[[f'{i}.mp4',3] for i in range(10)])
    manifest = dict(clips=30, shards=dict(a=note))
    held = {share:held_films(manifest, share) for share in (0,.01,.1,.11,.5,.99)}
    assert [len(o) for o in held.values()]==[0,1,1,2,5,9] and held[.1]<held[.5]<held[.99]
    assert held_films(dict(clips=3, shards=dict(a=note | dict(films=[['0.mp4',3]]))), .5)==set()


def test_many_processes_prepare_together(good, base, shards, tmp_path, capsys):
    """Two share the films: the clips of one, in a folder of shards each, that training takes as one;
    unfinished as long as one of them is; another number of processes is refused"""
    two = [SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None) for rank in (0,1)]
    out,ask = tmp_path/'out',dict(workers=0, shard=5)
    prepare(good, out, base, SPEC, crew=two[0], **ask)
    with pytest.raises(ValueError, match='part-01: prepare has not finished'): load_manifest(out)
    prepare(good, out, base, SPEC, crew=two[1], **ask)
    report = prepare(good, out, base, SPEC, crew=two[0], **ask)
    assert (report['clips'],report['files'])==(18,6) and load_manifest(out)['clips']==18
    named = lambda folder: sorted((o['file'],o['start'],o['digest']) for o in rows_of(folder))
    assert named(out)==named(shards)
    with pytest.raises(ValueError, match='parts = 2, not 1'): prepare(good, out, base, SPEC, **ask)
    assert main(['distil','-o',str(tmp_path/'run'),'--base',str(base),'--data',str(out),*sets(**TINY)])==0


@pytest.mark.slow
def test_prepare_under_a_launcher(good, base, shards, tmp_path):
    "Two real processes, from the command line; one report"
    (tmp_path/'two.py').write_text('import sys; from sfv_lite.cli import main; sys.exit(main())')
    launch = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, tmp_path/'two.py'
    done = python(*launch, 'prepare', good, '-o', tmp_path/'out', '--base', base, '--shard', 5)
    assert done.returncode==0 and done.stdout.count('18 clips of 8 frames')==1, done.stderr
    assert sorted(o['digest'] for o in rows_of(tmp_path/'out'))==sorted(o['digest'] for o in rows_of(shards))


def test_half_the_bits(good, tmp_path, monkeypatch):
    "bf16 is tried against fp32 on the first clips and said in the report; where it loses too much it is refused"
    report = prepare(good, tmp_path/'half', 'digits-teacher', SPEC, workers=0, dtype=torch.bfloat16)
    assert 30<report['bf16_db']<70 and load_manifest(tmp_path/'half')['dtype']=='torch.bfloat16'
    from sfv_lite import shards
    exact = shards.encode_clips
    def coarse(pipe, *args):
        arrays = exact(pipe, *args)
        if pipe.vae.dtype is torch.bfloat16: arrays['latents'] = arrays['latents'].round()
        return arrays
    monkeypatch.setattr(shards, 'encode_clips', coarse)
    with pytest.raises(ValueError, match='only .* dB from those in fp32'):
        prepare(good, tmp_path/'none', 'digits-teacher', SPEC, workers=0, dtype=torch.bfloat16)


def test_read_ahead(shards, base):
    "The order is a function of seed, epoch and process; two processes that read ahead change nothing"
    pipe = load_pipeline(base)
    def names(workers, start):
        reader = shard_batches(shards)(pipe, recipe(workers=workers), 4, process(), start)
        return [reader.clips for _ in zip(range(20), reader)]
    whole = names(0, 0)
    assert names(2, 0)==whole and names(2, 7)[:13]==names(0, 7)[:13]==whole[7:]


@pytest.mark.slow
def test_prepare_distil_sample(good, base, picture, tmp_path):
    "The way from videos to a clip, by the command line alone"
    for argv in (['prepare', good, '-o', tmp_path/'shards', '--base', base],
            ['distil', '-o', tmp_path/'run', '--base', base, '--data', tmp_path/'shards', *sets(**TINY)],
            ['sample', picture, '-o', tmp_path/'made.gif', '--model', tmp_path/'run']):
        done = sfv(*argv)
        assert done.returncode==0, done.stderr
    assert len(load_clip(tmp_path/'made.gif'))==8


def test_pretrain_on_shards(base, shards, tmp_path):
    "The teacher's run takes them too"
    assert main(['pretrain', '-o', str(tmp_path/'run'), '--base', str(base), '--data', str(shards), *sets(**TINY)])==0
    assert (tmp_path/'run'/'pipeline'/'model_index.json').exists()


def test_resumed_on_shards(base, shards, tmp_path):
    "A run that was killed after four of six steps ends with the same weights as one that was not"
    class Killed(BaseException): pass
    def stops(*args):
        yield from itertools.islice(shard_batches(shards)(*args), 4)
        raise Killed
    vars(stops).update(vars(shard_batches(shards))) # what it says of itself
    r = recipe(save_every=2)
    whole = distil(r, tmp_path/'whole', base, shard_batches(shards))
    with pytest.raises(Killed): distil(r, tmp_path/'cut', base, stops)
    with pytest.raises(ValueError, match='data .*whose clips were others'): distil(r, tmp_path/'cut', base, resume=True)
    cut = distil(r, tmp_path/'cut', base, shard_batches(shards), resume=True)
    assert files(whole)==files(cut)


@pytest.mark.parametrize('wrong', ['size','base','truncated','missing','unfinished','none'])
def test_shards_that_do_not_fit(wrong, shards, base, tmp_path, capsys):
    "One line names the cause before any training; nothing is written"
    folder,more,cause = tmp_path/'shards',[],''
    shutil.copytree(shards, folder)
    if wrong=='size': more,cause = ['--set','frames=6'],'frames = 8, the recipe [digits] says 6'
    if wrong=='base': base,cause = 'digits-teacher',"another base pipeline's VAE"
    if wrong=='truncated':
        whole = (folder/'shard-00002.parquet').read_bytes()
        (folder/'shard-00002.parquet').write_bytes(whole[:-100])
        cause = 'shard-00002.parquet: a damaged shard'
    if wrong=='missing': (folder/'shard-00001.parquet').unlink(); cause = 'shard-00001.parquet: a damaged shard'
    if wrong=='unfinished': (folder/'shard-00003.json').unlink(); cause = 'prepare has not finished'
    if wrong=='none': folder,cause = tmp_path,'holds no shards'
    argv = ['distil', '-o', str(tmp_path/'run'), '--base', str(base), '--data', str(folder)]
    assert main([*argv, *sets(**TINY), *more])==1
    said = capsys.readouterr().err
    assert cause in said, said
    assert not (tmp_path/'run').exists()


def test_a_shard_of_more_than_two_gigabytes(tmp_path):
    "2,100 clips of a megabyte each, as `--shard 4096` makes them at SVD's size: written and read again, some at a time"
    from sfv_lite.shards import _write_shard
    from sfv_lite.stream import read_rows
    rows = [dict(latents=bytes(2**20), start=float(k), file='a') for k in range(2100)]
    _write_shard(tmp_path, 'shard-00000', rows, dict(rows=len(rows)))
    note = json.loads((tmp_path/'shard-00000.json').read_text())
    some = np.array([2099,0,1000,1001])
    assert [o['start'] for o in read_rows(tmp_path/'shard-00000.parquet', note, some)]==some.tolist()


# several sizes ------------------------------------------------------------------------------------

@pytest.mark.parametrize('counts', [(1,1), (5,5), (60,30,10), (997,3), (7,1,1,1)])
def test_turns(counts):
    """In every epoch each folder has its number, and at any time its share but for a turn or so;
    orders differ between epochs and seeds; what came before a micro-batch is found without going there"""
    turns,p = Turns([*counts], 0),np.array(counts)/sum(counts)
    which = np.array([*itertools.islice(turns.since(0), 3*turns.epoch)])
    seen = (which[:,None]==np.arange(len(p))).cumsum(0)
    assert (seen[turns.epoch-1::turns.epoch]==np.outer([1,2,3], counts)).all()
    assert (np.abs(seen-p*np.arange(1, 1+len(which))[:,None])<1+(len(p)-2)*p).all()
    for start in (0, 1, turns.epoch-1, turns.epoch, 2*turns.epoch+1):
        assert turns.before(start)==np.bincount(which[:start], minlength=len(p)).tolist()
        assert [*itertools.islice(turns.since(start), 5)]==which[start:start+5].tolist() or start+5>len(which)
    orders = [Turns([*counts], seed).order(epoch).tolist() for seed in (0,1) for epoch in range(8)]
    assert turns.epoch<3 or len({str(o) for o in orders})>len(orders)//2


def test_turns_do_not_fall_into_step():
    "Two folders of one size: what happens every fourth time, as R1 does, meets both about as often"
    which = np.array([*itertools.islice(Turns([50,50], 0).since(0), 4000)])
    assert all(.4<which[k::4].mean()<.6 for k in range(4))


def test_one_of_several_is_as_before(shards, base):
    "A list of one folder is that folder, in what a run writes down too, and to the bit"
    pipe,(a,b) = load_pipeline(base),(shard_batches(o) for o in (shards,[shards]))
    assert (a.source,a.content)==(b.source,b.content)==(str(shards),load_manifest(shards)['content'])
    r,manifest = recipe(workers=0),load_manifest(shards)
    held = held_films(manifest, r.held_out)
    clips = Clips(shards, manifest, lambda film: film not in held)
    due = [o for epoch in range(3) for part in clips.order(0, epoch, 0, 1, 128) for o in part[:len(clips)//4*4]]
    due = [f"{o['file']} at {o['start']:.2f} s" for o in clips.read(np.array(due))]
    one,other = (o(pipe, r, 4, process()) for o in (a,b))
    for k in range(9):
        x,y = next(one),next(other)
        assert torch.equal(x.latents, y.latents) and torch.equal(x.cond.image_latents, y.cond.image_latents)
        assert one.clips==other.clips==due[4*k:4*k+4]


def test_sizes_are_mixed(shards, flat, base):
    """Every clip that is not held out is seen once an epoch, but for a rest of each folder;
    a film that one folder holds out is in no batch; several processes take turns in one order; so do readers ahead;
    a resumed run finds its place"""
    pipe,make,manifests = load_pipeline(base),shard_batches([shards,flat]),[load_manifest(o) for o in (shards,flat)]
    def some(n, start=0, rank=0, world=1, batch=2, workers=0):
        reader = make(pipe, recipe(workers=workers, held_out=.2), batch, process(rank, world), start)
        return [(o.latents,tuple(reader.clips)) for o,_ in zip(reader, range(n))]
    held = set.union(*(held_films(o, .2) for o in manifests))
    left = [sum(n for note in o['shards'].values() for film,n in note['films'] if film not in held) for o in manifests]
    an_epoch = sum(o//2 for o in left)
    whole = some(2*an_epoch)
    for epoch in (whole[:an_epoch], whole[an_epoch:]):
        clips = [(x.shape[1],name) for x,names in epoch for name in names]
        assert len(set(clips))==len(clips)==sum(o//2*2 for o in left)
        assert [sum(t==frames for t,_ in clips) for frames in (8,6)]==[o//2*2 for o in left]
    assert not held & {name.split(' at ')[0] for _,names in whole for name in names}
    for start,workers in ((5,0), (an_epoch+3,0), (5,3)):
        for (x,a),(y,b) in zip(some(8, start, workers=workers), whole[start:], strict=False): assert a==b and x.equal(y)
    sizes = lambda dealt: [x.shape[1:] for x,_ in dealt]
    assert sizes(some(20, batch=4))==sizes(some(20, 0, 0, 2))==sizes(some(20, 0, 1, 2))==sizes(some(20, 0, 3, 4, 1))


def test_held_out_under_any_folder():
    "What one folder of shards holds out all do, with more or fewer folders before the name, whose end is not enough"
    held = dict(wide={'tall/a.mp4','b.mp4'}, tall={'c.mp4'})
    takes = {o:for_training(o, held) for o in held}
    left = lambda folder, *films: [o for o in films if takes[folder](o)]
    assert left('tall', 'a.mp4', 'x/a.mp4', 'x/b.mp4', 'xb.mp4', 'c.mp4', 'y/c.mp4')==['x/a.mp4','xb.mp4','y/c.mp4']
    assert left('wide', 'a.mp4', 'b.mp4', 'x/c.mp4', 'd.mp4')==['a.mp4','d.mp4']


def test_validation_sees_the_first_size(shards, flat, base):
    "And the same clips as a run on the first folder alone"
    pipe,r = load_pipeline(base),recipe()
    held = [shard_batches(o).held(pipe, r, 4).latents for o in (shards, [shards,flat])]
    assert torch.equal(*held) and held[0].shape[1:]==(8,4,8,8)


def test_resumed_on_two_sizes(shards, flat, base, tmp_path, capsys):
    """By the command line: four steps of two micro-batches, and two and two, come to the same weights;
    without one of the folders, or in another order, the run is not gone on with"""
    both,more = [str(shards),str(flat)],sets(**TINY | dict(accumulation=2, steps=4))
    begin = ['distil','--base',str(base),'--data',*both,*more]
    assert main([*begin,'-o',str(tmp_path/'whole')])==0
    assert main([*begin,'-o',str(tmp_path/'cut'),'--set','steps=2'])==0
    again = ['distil','--base',str(base),'-o',str(tmp_path/'cut'),'--resume',*more]
    capsys.readouterr()
    for data in (both[:1], both[::-1]):
        assert main([*again,'--data',*data])==1
        assert 'whose clips were others' in (said := capsys.readouterr().err) and both[1] in said
    assert main([*again,'--data',both[0],'--data',both[1]])==0
    assert files(tmp_path/'whole/pipeline')==files(tmp_path/'cut/pipeline')
    assert json.loads((tmp_path/'cut/recipe.json').read_text())['data']==both


@pytest.mark.slow
def test_other_verbs_take_two_sizes(shards, flat, base, tmp_path):
    "A run on two folders is made again from its recipe.json; a teacher is trained on them, and so are rivals"
    begin = ['--base',str(base),'--data',str(shards),str(flat),*sets(**TINY | dict(steps=2, teacher_steps=2))]
    assert main(['distil',*begin,'-o',str(tmp_path/'run')])==0
    assert main(['reproduce',str(tmp_path/'run'),'-o',str(tmp_path/'again')])==0
    assert main(['pretrain',*begin,'-o',str(tmp_path/'teacher')])==0
    for method in ('ladd','consistency'):
        assert main(['distil','--method',method,*begin,'-o',str(tmp_path/method)])==0


def test_another_folder_under_the_same_path(shards, flat, good, base, tmp_path):
    "The second folder is made anew with other noise: another run"
    two = shutil.copytree(flat, tmp_path/'two')
    distil(recipe(), tmp_path/'run', base, shard_batches([shards,two]))
    shutil.rmtree(two)
    prepare(good, two, base, Cutting(6, 7, 16, 32), seed=1, workers=0)
    with pytest.raises(ValueError, match='whose clips were others'):
        distil(recipe(steps=8), tmp_path/'run', base, shard_batches([shards,two]), resume=True)


@pytest.mark.parametrize('wrong', ['twice','copy','order','few','base','none'])
def test_folders_that_do_not_fit(wrong, shards, flat, good, base, tmp_path, capsys):
    "One line names the folder and the cure before any training; nothing is written"
    second,more = flat,{}
    if wrong=='twice': second,cause = shards,[f'{shards}: holds the same shards as','name every folder once']
    if wrong=='copy':
        second = shutil.copytree(shards, tmp_path/'copy')
        cause = [f'{second}: holds the same shards as {shards}','name every folder once']
    if wrong=='order': shards,second,cause = flat,shards,[f'{flat}: its clips have','name a folder of that size first']
    if wrong=='few':
        second,more = tmp_path/'few',dict(batch=12)
        prepare(good/'loop.gif', second, base, Cutting(6, 7, 16, 32), workers=0)
        cause = [f'{second}: a process has 4 clips','prepare more']
    if wrong=='base':
        second = tmp_path/'other'
        prepare(good, second, 'digits-teacher', Cutting(6, 7, 16, 32), workers=0)
        cause = [f"{second}: was made with another base pipeline's VAE",'prepare it with --base of this one']
    if wrong=='none': second,cause = tmp_path,[f'{tmp_path}: holds no shards','sfv-lite prepare makes them']
    capsys.readouterr()
    argv = ['distil','-o',str(tmp_path/'run'),'--base',str(base),'--data',str(shards),str(second)]
    assert main([*argv, *sets(**TINY | more)])==1
    said = capsys.readouterr().err
    assert all(o in said for o in cause) and len(said.splitlines())==1, said
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_two_processes_on_two_sizes(shards, flat, base, tmp_path):
    "From the command line, under a launcher, to the end; and what is resumed there is the same"
    (tmp_path/'two.py').write_text('import sys; from sfv_lite.cli import main; sys.exit(main())')
    launch = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, tmp_path/'two.py'
    def run(out, *more, **keys):
        argv = 'distil','--base',base,'--data',shards,flat,'-o',tmp_path/out,*sets(**TINY | keys),*more
        done = python(*launch, *argv)
        assert done.returncode==0, done.stderr[-3000:]
    run('whole')
    run('cut', steps=3)
    run('cut', '--resume')
    assert json.loads((tmp_path/'cut/recipe.json').read_text())['processes']==2
    assert files(tmp_path/'whole/pipeline')==files(tmp_path/'cut/pipeline')
