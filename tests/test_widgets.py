"Widgets without a browser: what they hold, and the panel on runs that grow, end or break off in the middle of a line"
import shutil, threading, time
from io import BytesIO
import pytest
from conftest import begin
from PIL import Image
from sfv_lite.files import append_row, save_clip
from sfv_lite.recipe import Recipe
from sfv_lite.video import moving_digits, tile
from sfv_lite.widgets import _moving, flip_book, watch


@pytest.fixture
def run(tmp_path):
    "A folder as `distil` leaves it after three steps and one sample"
    begin(tmp_path/'run', 'distil', Recipe.load('digits', steps=5, head_start=1))
    for i in range(1, 4): line(tmp_path/'run', i)
    sample(tmp_path/'run', 2)
    return tmp_path/'run'


def line(run, step):
    row = dict(step=step, seconds=60.*step, d_real=1., d_fake=.5*step, real_spatial0=.1, fake_spatial0=-.1)
    append_row(run/'log.csv', row)
def sample(run, step): save_clip(tile(moving_digits(4, step)[0], cols=2), run/'samples'/f'step_{step:06}.gif')


def wait_for(f, seconds=20):
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic()<end, 'nothing happened'
        time.sleep(.05)


def test_pages_move_and_lines_that_stay_are_held_once():
    x,_ = moving_digits(3)
    book = flip_book('n', {str(i):dict(same=_moving(x), other=_moving(x.roll(i,1))) for i in range(3)}, start=2)
    _,slider,grid = book.children
    _,same,_,stack = grid.children
    assert slider.index==stack.selected_index==2 and len(stack.children)==3 and same.format=='webp'
    with Image.open(BytesIO(same.value)) as file: assert (file.n_frames, file.size)==(8, (3*33, 33))


def test_panel_follows_a_run(run):
    "A new line, a new sample, the end: each is seen; then the thread is gone"
    before = set(threading.enumerate())
    panel = watch(run, every=.05)
    assert 'step 3 of 6, 3.0 minutes' in panel.status.value and panel.slider.options==('2',)
    curves = bytes(panel.curves.value)
    line(run, 4)
    wait_for(lambda: 'step 4' in panel.status.value and bytes(panel.curves.value)!=curves)
    sample(run, 4)
    wait_for(lambda: panel.slider.options==('2','4'))
    assert panel.slider.value=='4' and panel.stack.selected_index==1
    (run/'pipeline').mkdir()
    wait_for(lambda: 'finished' in panel.status.value and set(threading.enumerate())<=before)


def test_panel_opens_before_the_run_and_bears_half_a_line(run, tmp_path):
    shutil.move(run, tmp_path/'later')
    panel = watch(run, every=.05)
    assert 'no run yet' in panel.status.value and not panel.stack.children
    with (tmp_path/'later'/'log.csv').open('a') as f: f.write('4,24')
    shutil.move(tmp_path/'later', run)
    wait_for(lambda: 'step 3' in panel.status.value and panel.slider.options==('2',))
    (run/'pipeline').mkdir()


def test_panel_on_a_finished_run_starts_no_thread(run):
    (run/'pipeline').mkdir()
    before = set(threading.enumerate())
    assert 'finished' in watch(run).status.value and set(threading.enumerate())<=before


def test_panel_says_that_a_run_has_begun(tmp_path):
    "As soon as the folder is there, long before its first line"
    panel = watch(tmp_path/'new', every=.05)
    begin(tmp_path/'new', 'pretrain', Recipe.load('digits'))
    wait_for(lambda: 'pretrain, step 0 of 7000' in panel.status.value)
    (tmp_path/'new'/'pipeline').mkdir()


def test_a_closed_panel_looks_no_more(run):
    before = set(threading.enumerate())
    panel = watch(run, every=.05)
    assert not set(threading.enumerate())<=before
    panel.close()
    wait_for(lambda: set(threading.enumerate())<=before)


def test_a_run_begun_anew_in_its_folder(run, tmp_path):
    "Nothing of the old run stays, neither while there is nothing new nor afterwards"
    sample(run, 4)
    panel = watch(run, every=.05)
    assert panel.slider.options==('2','4') and panel.curves in panel.children
    old = [bytes(o.value) for o in panel.stack.children]
    shutil.rmtree(run)
    wait_for(lambda: 'no run yet' in panel.status.value and not panel.stack.children)
    assert panel.curves not in panel.children and panel.slider not in panel.children
    begin(run, 'distil', Recipe.load('digits', steps=7))
    for i in range(1, 4): line(run, i)
    save_clip(tile(moving_digits(4, 99)[0], cols=2), run/'samples'/'step_000002.gif')
    wait_for(lambda: 'step 3' in panel.status.value and panel.slider.options==('2',))
    assert len(panel.stack.children)==1 and bytes(panel.stack.children[0].value) not in old
    (run/'pipeline').mkdir()


def test_a_sample_drawn_anew_is_shown(run):
    "The same name and the same number of lines, another picture"
    panel = watch(run, every=.05)
    old = bytes(panel.stack.children[0].value)
    save_clip(tile(moving_digits(4, 99)[0], cols=2), run/'samples'/'step_000002.gif')
    wait_for(lambda: panel.stack.children and bytes(panel.stack.children[0].value)!=old)
    (run/'pipeline').mkdir()
