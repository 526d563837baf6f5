"Which films are meant, the processes that decode them, and what is worth training on"
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from textwrap import dedent
import numpy as np, pytest, torch
from conftest import files, rows_of
from sfv_lite.cli import main
from sfv_lite.files import save_clip, save_frames
from sfv_lite.films import Became, Cutting, Film, clips_of
from sfv_lite.footage import Marks, Seen, Worth, decoded, find_films, measured
from sfv_lite.shards import prepare
from sfv_lite.video import moving_digits

SPEC = Cutting(8, 7, 32, 32)
there_and_back = lambda seed: torch.cat([(x:=moving_digits(1, seed)[0][0]), x.flip(0)])


@pytest.fixture
def folder(tmp_path):
    "Two films of two clips each"
    folder = tmp_path/'films'
    folder.mkdir()
    for i in range(2): save_clip(there_and_back(i), folder/f'{i}.mp4', 7)
    return folder


def names(found): return [str(o.path.name) for o in found.films]


# which films are meant ----------------------------------------------------------------------------

def test_folders_behind_links_are_searched_once(folder, tmp_path):
    """A link to a folder elsewhere is followed, two links to one place count once, a loop ends,
    hidden folders are not meant, a broken link is named"""
    other = tmp_path/'other'
    other.mkdir()
    save_clip(there_and_back(2), other/'2.mp4', 7)
    links = {'link':other, 'link again':other, 'loop':folder, '.hidden':other}
    for name,to in links.items(): (folder/name).symlink_to(to)
    (folder/'gone.mp4').symlink_to(tmp_path/'nowhere')
    found = find_films(folder)
    assert names(found)==['0.mp4','1.mp4','gone.mp4','2.mp4']
    assert found.passed=={'links followed':3, 'links to folders already searched':2}
    assert [o.reason for _,o in decoded(found.films, SPEC, 0) if isinstance(o, Became)]==[None,None,'no such file',None]


def test_lists(folder, tmp_path):
    """A text file names films relative to itself, one that is missing is named;
    a videofolder's metadata is not meant; nothing there is an error"""
    (folder.parent/'list.txt').write_text("\ufefffilms/1.mp4\r\n\nfilms/missing.mp4\n", encoding='utf-8')
    found = find_films(folder.parent/'list.txt')
    assert names(found)==['1.mp4','missing.mp4']
    assert [o.reason for _,o in decoded(found.films, SPEC, 0) if isinstance(o, Became)]==[None,'no such file']
    assert find_films(folder/'0.mp4').films==[Film(folder/'0.mp4')]
    (folder/'metadata.jsonl').write_text('{}')
    assert len(find_films(folder).films)==2
    (tmp_path/'empty').mkdir()
    for wrong in ('none','empty'):
        with pytest.raises(FileNotFoundError, match=wrong): find_films(tmp_path/wrong)


def test_tables_of_parts(folder):
    """A .csv names parts of films in seconds, as published data sets do;
    each part gives its own clips and no picture from outside"""
    whole = [clip for _,clip in list(clips_of(folder/'0.mp4', SPEC))[:-1]]
    table = folder.parent/'cuts.csv'
    table.write_text('file,caption,start,end\n'
        f'films/0.mp4,"there, a digit",0,{8/7}\nfilms/0.mp4,back,{8/7},\nfilms/1.mp4,,0.5,1\n')
    found = list(decoded(find_films(table).films, SPEC, 2))
    clips = [o for _,o in found if not isinstance(o, Became)]
    assert [round(start,3) for start,*_ in clips]==[0.,1.143]
    for (_,part,*_),clip in zip(clips, whole, strict=True): assert (part==clip).all()
    ends = [o.reason for _,o in found if isinstance(o, Became)]
    assert ends[:2]==[None,None] and found[-1][1].reason.startswith('too short')


@pytest.mark.parametrize('text,said', [
    ('path,start,end\na,0,1\n','no column named file'),
    ('file,start,end\na.mp4,1,1\n','line 2: start'),
    ('file,start,end\na.mp4,0,1\na.mp4,x,2\n','line 3: start'),
    ('file,start\n,3\n','names no file'),
    ('file\n','holds no files')])
def test_tables_that_are_wrong(text, said, tmp_path):
    (tmp_path/'cuts.csv').write_text(text)
    with pytest.raises((ValueError,FileNotFoundError), match=said): find_films(tmp_path/'cuts.csv')


def test_numbered_pictures_beside_films(folder, base, tmp_path, capsys):
    """frame_2 before frame_10; a missing number is a gap; without --picture-fps they are passed over,
    and where nothing else is there, that is said"""
    x,walk = torch.cat([there_and_back(5), there_and_back(5)])[:27],folder/'deep'/'walk'
    save_frames(x, walk)
    for o in list(walk.iterdir()): o.rename(o.with_name(f"frame_{int(re.sub(r'[^0-9]', '', o.stem))}.png"))
    for k in (9,11,12): (walk/f'frame_{k}.png').unlink() # a picture may be missing, two in a row are a gap
    (folder/'poster.png').write_bytes((walk/'frame_10.png').read_bytes())
    argv = ['prepare', str(folder), '--base', str(base), '-o']
    assert main([*argv, str(tmp_path/'without')])==0
    said = capsys.readouterr().out
    assert '4 clips' in said and '24 × numbered pictures' in said and '1 × .png' in said
    assert main([*argv, str(tmp_path/'with'), '--picture-fps', '7'])==0
    assert '6 clips' in (said := capsys.readouterr().out) and '1 × gaps' in said # 11 ticks before the gap, 14 behind it
    (first,clip),*_ = clips_of(Film(walk/'frame_*.png', rate=7), SPEC)
    assert first==0 and (np.abs(clip/127.5-1-x[:8].permute(0,2,3,1).numpy())<.01).all()
    assert main(['prepare', str(folder/'deep'), '-o', str(tmp_path/'none')])==1
    assert '24 numbered pictures and no film; --picture-fps' in capsys.readouterr().err


def test_numbers_of_any_length(tmp_path):
    "A time in nanoseconds, or what nobody would count: one lost picture breaks the film, and no more"
    x = torch.cat([there_and_back(4)]*2)
    save_frames(x, tmp_path/'walk')
    for k,o in enumerate(sorted((tmp_path/'walk').iterdir())):
        o.rename(o.with_name(f'p{k}.png' if k<31 else f"p{k}{'9'*200}.png"))
    *found,became = clips_of(Film(tmp_path/'walk'/'p*.png', rate=7), SPEC)
    assert len(found)==3 and became.gaps==1 and not became.reason, became


# names --------------------------------------------------------------------------------------------

def test_names_of_all_kinds(folder, base, tmp_path, capsys):
    """A name that is not UTF-8, one with a colon, one that looks like an address:
    films like others, and nothing is asked of any network"""
    whole = (folder/'0.mp4').read_bytes()
    odd = [b'\xff\xfe.mp4', b'2026-01-02T10:30:00.mp4', b'http:', b'line\nbreak.mp4', b'100%d.mp4',
        '数字 [v2]*?.mp4'.encode()]
    for name in odd:
        where = os.path.join(os.fsencode(folder), name)
        if name==b'http:': # http://example.com/a.mp4, as a path on disk
            os.makedirs(where+b'/example.com')
            where += b'/example.com/a.mp4'
        with open(where, 'wb') as o: o.write(whole)
    monkey = Path('http:/example.com/a.mp4')
    assert main(['prepare', str(folder), '-o', str(tmp_path/'out'), '--base', str(base), '--repeats', 'exact'])==0
    report = json.loads((tmp_path/'out/report.json').read_text())
    assert report['clips']==4 and report['dropped']=={'exact repeat':12} and not report['refused']
    assert main(['prepare', str(folder), '-o', str(tmp_path/'all'), '--base', str(base)])==0
    named = {o['file'] for o in rows_of(tmp_path/'all')}
    assert {r'\xff\xfe.mp4', '2026-01-02T10:30:00.mp4', str(monkey)}<=named


@pytest.mark.parametrize('name', ['sh[v2]','a::b','a:b','sh*','sh?','{a}','s p','~'])
def test_shards_are_read_from_the_folder_that_was_named(name, folder, base, tmp_path):
    """Names that would be patterns or addresses elsewhere;
    a neighbour whose name such a pattern would match is left alone"""
    one = tmp_path/'one'
    one.mkdir()
    shutil.copy(folder/'0.mp4', one/'mine.mp4')
    prepare(one, tmp_path/name, base, SPEC, workers=0)
    for other in ('shv','sh2','sha','shards','a'):
        (tmp_path/other).mkdir()
        (tmp_path/other/'shard-00000.parquet').write_bytes(b'not mine')
    assert [o['file'] for o in rows_of(tmp_path/name)]==['mine.mp4']*2


# processes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['script','standard input'])
def test_a_script_without_a_guard(how, folder, base, tmp_path):
    "`prepare` from a plain script, or one that comes from standard input: no worker runs the script again"
    code = dedent(f"""\
        from sfv_lite.films import Cutting
        from sfv_lite.shards import prepare
        print('once')
        r = prepare({str(folder)!r}, {str(tmp_path/'out')!r}, {str(base)!r}, Cutting(8,7,32,32), workers=2)
        print(r['clips'], r['refused'])""")
    (tmp_path/'plain.py').write_text(code)
    script = str(tmp_path/'plain.py') if how=='script' else '-'
    done = subprocess.run([sys.executable, script], input=code, capture_output=True, text=True, env=os.environ)
    assert done.returncode==0 and done.stdout=='once\n4 []\n', done.stderr


def decoders():
    "Processes that decode for this one"
    ours = lambda pid: b'sfv_lite.footage import serve' in _line(pid) and _parent(pid)==os.getpid()
    return [int(o) for o in os.listdir('/proc') if o.isdigit() and ours(o)]
def _line(pid):
    try: return Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError: return b''
def _parent(pid):
    try: return int(Path(f'/proc/{pid}/stat').read_text().rsplit(')',1)[1].split()[1])
    except OSError: return 0
linux = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason="looks at processes in /proc")


SERVE = '''
import os, sys, sfv_lite.footage as f
old = f.clips_and_marks
def new(film, spec, alive):
    {code}
    return old(film, spec, alive)
f.clips_and_marks = new
f.serve()
'''


def serving(code, start=subprocess.Popen):
    "In place of `Popen`: a decoder that first runs this code at each film"
    return lambda argv,**kw: start([argv[0], '-c', SERVE.format(code=code)], **kw)


@linux
def test_stopped_in_a_notebook(folder, base, tmp_path, monkeypatch):
    "The stop button is a KeyboardInterrupt somewhere in the middle; the traceback is kept, the decoders are not"
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr('sfv_lite.shards.encode_clips', stop)
    with pytest.raises(KeyboardInterrupt) as kept: prepare(folder, tmp_path/'out', base, SPEC, workers=2)
    assert kept.tb and not decoders()


@linux
def test_a_decoder_that_is_killed_is_given_a_second_chance(folder):
    "Killed once, the film begins anew in another process and no clip is missing or there twice"
    films = find_films(folder).films
    want = [(i,o[0]) for i,o in decoded(films, SPEC, 0) if not isinstance(o, Became)]
    stream = decoded(films, SPEC, workers=1)
    got = [next(stream)]
    for o in decoders(): os.kill(o, signal.SIGKILL)
    got += list(stream)
    assert [(i,o[0]) for i,o in got if not isinstance(o, Became)]==want
    assert [o.reason for _,o in got if isinstance(o, Became)]==[None,None] and not decoders()


def test_a_decoder_that_dies_twice_costs_one_film(folder, monkeypatch):
    "The film is refused with the true reason, the next ones are decoded"
    shutil.copy(folder/'0.mp4', folder/'bad.mp4')
    films = find_films(folder).films
    deaths = {'os.kill(os.getpid(), 11)':'its decoder crashed (SIGSEGV)',
        'os.kill(os.getpid(), 9)':'its decoder was killed, by the system',
        'os.kill(os.getpid(), 27)':'its decoder computed for',
        'os._exit(7)':'its decoder ended with exit code 7 (KeyError: 3)'}
    for how,said in deaths.items():
        dies = f"if film.path.name=='bad.mp4': sys.stderr.write('KeyError: 3\\n'); sys.stderr.flush(); {how}"
        monkeypatch.setattr(subprocess, 'Popen', serving(dies))
        ends = {films[i].path.name:o.reason for i,o in decoded(films, SPEC, 2) if isinstance(o, Became)}
        monkeypatch.undo()
        assert ends.pop('bad.mp4').startswith(said) and set(ends.values())=={None}, ends


def test_when_all_decoders_die_nothing_is_recorded(folder, base, tmp_path, monkeypatch):
    "An error, not a list of refused films; and the same command goes on once it is mended"
    start = subprocess.Popen
    broken = lambda argv,**kw: start([argv[0], '-c', 'import nothing_of_this_name'], **kw)
    monkeypatch.setattr(subprocess, 'Popen', broken)
    with pytest.raises(RuntimeError, match="No module named 'nothing_of_this_name'"):
        prepare(folder, tmp_path/'out', base, SPEC, workers=2)
    assert not [o for o in files(tmp_path/'out') if 'shard' in o or 'report' in o]
    monkeypatch.setattr(subprocess, 'Popen', start)
    report = prepare(folder, tmp_path/'out', base, SPEC, workers=2)
    assert report['clips']==4 and not report['refused']


@linux
def test_a_decoder_that_hangs(folder, monkeypatch):
    "One that computes without a picture is ended, and says so"
    shutil.copy(folder/'0.mp4', folder/'bad.mp4')
    hangs = "f.PATIENCE = 1; alive()\n    while film.path.name=='bad.mp4': pass"
    monkeypatch.setattr(subprocess, 'Popen', serving(hangs))
    ends = [o.reason for _,o in decoded(find_films(folder).films, SPEC, 2) if isinstance(o, Became)]
    assert ends==[None,None,'its decoder computed for 60 s without a picture']


# what is worth training on ------------------------------------------------------------------------

def test_what_is_dropped_is_counted(base, tmp_path, capsys):
    """Still, wild, black, there before, nearly there before: each with its option and its count,
    in the report and on the screen; resumed runs know what was before"""
    folder = tmp_path/'films'
    folder.mkdir()
    x = there_and_back(1)
    save_clip(x, folder/'a.mp4', 7)
    shutil.copy(folder/'a.mp4', folder/'b.mp4')
    save_clip(x, folder/'c.webm', 7)
    save_clip(x[:1].expand(16,-1,-1,-1), folder/'d still.mp4', 7)
    save_clip(-torch.ones_like(x), folder/'e black.mp4', 7)
    save_clip(torch.stack([o.roll(11*k, -1) for k,o in enumerate(x)]), folder/'f wild.mp4', 7)
    argv = ['prepare', str(folder), '--base', str(base), '--shot', '9']
    assert main([*argv, '-o', str(tmp_path/'all')])==0
    assert '12 clips' in capsys.readouterr().out
    limits = ['--least-motion', '5', '--most-motion', '240', '--least-contrast', '4', '--repeats', 'near']
    assert main([*argv, *limits, '-o', str(tmp_path/'some')])==0
    said,report = capsys.readouterr().out,json.loads((tmp_path/'some/report.json').read_text())
    dropped = {'exact repeat':2, 'near repeat':2, 'moves too little':4, 'moves too much':2}
    assert report['clips']==2 and report['dropped']==dropped and '2 × near repeat' in said
    assert main([*argv, '--least-contrast', '4', '--shard', '1', '-o', str(tmp_path/'again'), '--repeats', 'exact'])==0
    report = json.loads((tmp_path/'again/report.json').read_text())
    n = report['dropped']['exact repeat'] # the still film's second clip is one, or nearly, as the encoder likes
    assert n in (2,3) and report['dropped']=={'exact repeat':n, 'nearly uniform':2}, report
    done = sorted((tmp_path/'again').glob('shard-*'))
    before = files(tmp_path/'again')
    for o in done[4:]: o.unlink()
    assert main([*argv, '--least-contrast', '4', '--shard', '1', '-o', str(tmp_path/'again'), '--repeats', 'exact'])==0
    assert {k:v for k,v in files(tmp_path/'again').items() if k!='.lock'}=={k:v for k,v in before.items() if k!='.lock'}


@pytest.mark.parametrize('wrong,said', [
    (dict(repeats='all'),'repeats'),
    (dict(least_motion=9, most_motion=3),'least_motion 9'),
    (dict(most_motion=300),'most_motion 300')])
def test_limits_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said): Worth(**wrong)


def test_many_clips_are_searched_quickly():
    "A hundred thousand looks: one more is compared with all of them in well under the time that encoding takes"
    chance,seen = np.random.default_rng(0),Seen()
    marks = measured(chance.integers(0, 255, (8,32,32,3), dtype=np.uint8))
    looks = [o.tobytes() for o in chance.integers(0, 256, (100_000,24), dtype=np.uint8)]
    for o in looks: seen.add(Marks(1, 1, o, o), 'a')
    seen.add(marks, 'b')
    near,far = Marks(1, 1, marks.look, b'other'),Marks(1, 1, bytes(24), b'other')
    start = time.perf_counter()
    assert [seen.repeats(o, 'c') for o in (marks,near,far)]==['exact','near','']
    assert time.perf_counter()-start<1
