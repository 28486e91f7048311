"""The command line, run as a user runs it."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import loading
import opening
from chat import Chat
from images import open_image
from llama import KVCache
from llava import Llava
from marks import draw_marks, parse_mark

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sample(*arguments, stdin="", **environment):
    """Run sample.py; returns (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "sample.py", *arguments],
        input=stdin.encode(),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def asked(*questions):
    """What the same model answers to the same questions when called from Python."""
    chat = Chat.from_pretrained("tiny/llava", dtype=torch.float32)
    images = [open_image("tiny/example.png")]
    answers = []
    for question in questions:
        answers.append("".join(chat.ask(question, images)))
        images = []
    return answers


def test_without_arguments_it_answers_about_the_bundled_picture():
    status, out, err = sample()
    assert (status, out) == (0, asked("Describe the picture.")[0] + "\n")
    assert "tiny/llava" in err.splitlines()[0] and "cpu in float32" in err.splitlines()[0] and "MB of weights" in err


def test_an_answer_does_not_wait_for_the_compiler_to_be_imported():
    # 2.6 to 2.9 need sympy, a third of a second, to make a layer on the meta device; the pinned version does not.
    late = {"torch._dynamo"} | ({"sympy"} if torch.__version__ >= "2.13" else set())
    code = f"import sys; sys.argv = ['sample.py']; import sample; sample.main(); assert not {late} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_compiling_without_a_compiler_is_one_line(tmp_path):
    status, _, err = sample("--compile", CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert status == 2 and "--compile needs a C++ compiler" in err.splitlines()[-1]


def test_a_question_from_a_pipe():
    assert sample("-", stdin="How many things are there?\n")[:2] == (0, asked("How many things are there?")[0] + "\n")


def test_a_chat_keeps_its_picture_and_ends_with_its_input():
    questions = ["How many things are there?", "Describe the picture."]
    status, out, _ = sample("--chat", stdin="\n".join(questions))
    assert (status, out.splitlines()) == (0, asked(*questions))


def test_a_chat_survives_a_question_that_cannot_be_asked():
    status, out, err = sample("--chat", stdin="What is <image>?\nDescribe the picture.\n")
    assert (status, out.splitlines()) == (2, asked("Describe the picture."))
    assert "'<image>'" in err


def test_show_prompt_prints_text_and_ids():
    _, out, err = sample("--show-prompt", "--system", "Be brief.", "Where is the star?")
    assert r"'Be brief. USER: <image>\nWhere is the star? ASSISTANT:'" in err and "[1, " in err
    assert "USER" not in out


def test_sampling_options_and_a_seed():
    options = ("--temperature", "9", "--top-k", "50", "--top-p", "0.99", "--max-new-tokens", "12", "Describe the picture.")
    first, again, other = (sample(*options, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("arguments, pictures", [([], 1), (["Hi."], 0), (["--image", "tiny/example.png", "Hi."], 1)])
def test_another_model_gets_the_bundled_picture_only_when_nothing_is_asked(arguments, pictures):
    _, _, err = sample("--model", "tiny/llava", "--show-prompt", "--max-new-tokens", "1", *arguments)
    assert err.count("<image>") == pictures
    assert ("no --image is given" in err) == (pictures == 0)


@pytest.mark.parametrize(
    "free, arguments, hint",
    [
        (8e6, [], "use --dtype bfloat16"),
        (3.7e6, [], "use --dtype bfloat16 --quantize int4"),
        (12.6e6, [], "--max-new-tokens"),
        (12.6e6, ["--chat"], "--max-new-tokens"),
        (1e6, ["--dtype", "float16"], "use a smaller model"),
        (10, ["--model", "tests/fixtures/llava", "Hi."], "use a smaller model"),  # its layers are too narrow for 4 bits
    ],
)
def test_what_helps_when_memory_is_short(free, arguments, hint, monkeypatch, capsys):
    import sample as module

    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    monkeypatch.setattr(loading, "free_memory", lambda device: free)
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert hint in capsys.readouterr().err


def test_several_pictures_take_several_places():
    _, _, err = sample("--image", "tiny/example.png", "--image", "tiny/example.png", "--show-prompt", "Describe the picture.")
    assert r"USER: <image>\n<image>\nDescribe" in err


def test_marks_are_drawn_saved_and_spoken_of(tmp_path):
    marks = ["red rectangle 10,10,60,60", "blue mask contour 5,5 90,10 40,100"]
    options = [option for mark in marks for option in ("--mark", mark)]
    file = tmp_path / "marked.png"
    status, _, err = sample(*options, "--save-marked", file, "--show-prompt", "Is {mark1} {mark2}? {mark1}!")
    assert status == 0 and "Is within the red rectangle with the blue mask contour? within the red rectangle! ASSISTANT" in err
    expected = draw_marks(open_image("tiny/example.png"), [parse_mark(mark) for mark in marks])
    assert Image.open(file).tobytes() == expected.tobytes()


def test_a_picture_that_cannot_be_saved_leaves_the_file(tmp_path):
    picture, file = tmp_path / "clear.png", tmp_path / "kept.jpg"
    Image.new("RGBA", (50, 50)).save(picture)
    file.write_bytes(b"kept")
    status, _, err = sample("--image", picture, "--mark", "red point 1,2", "--save-marked", file, "What?")
    assert status == 2 and "cannot write mode RGBA as JPEG" in err and file.read_bytes() == b"kept"


def test_another_command_is_refused():
    status, out, err = sample("--chat", stdin="/Mark red point 1,2\n/mark\tred point 1,2\nCount the things.\n")
    assert status == 2 and "'/Mark' is no command" in err and len(out.splitlines()) == 1


def test_a_mark_between_turns_is_a_new_picture(tmp_path):
    marks = ["red point 10,10", "lime point 50,50"]
    lines = ["Is there a star?", "/mark " + marks[1], "/mark of nothing", "What is {mark2}?", "Count the things."]
    file = tmp_path / "marked.png"
    status, out, err = sample("--chat", "--mark", marks[0], "--save-marked", file, "--show-prompt", stdin="\n".join(lines))
    assert status == 2 and err.count("no mark is called 'nothing'") == 1 and len(out.splitlines()) == 3
    prompts = [line for line in err.splitlines() if "USER:" in line]
    assert [prompt.count("<image>") for prompt in prompts] == [1, 2, 2]
    assert "<image>\\nWhat is at the lime point? ASSISTANT" in prompts[1]
    both = draw_marks(open_image("tiny/example.png"), [parse_mark(mark) for mark in marks])
    assert Image.open(file).tobytes() == both.tobytes()


def test_an_output_that_cannot_show_a_character_is_no_error():
    assert sample(PYTHONIOENCODING="ascii")[0] == 0


def here(monkeypatch, *arguments, stdin=b""):
    """The same in this process, which is faster: (exit status, standard output, standard error)."""
    import sample as module

    streams = [io.TextIOWrapper(io.BytesIO(data), newline="\n", write_through=True) for data in (stdin, b"", b"")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            patch.setattr(sys, name, stream)
        try:
            status = module.main() or 0
        except SystemExit as end:
            status = end.code
        out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return status, out, err


PICTURE, COUNT = "tiny/example.png", "How many things are there?"


@pytest.mark.parametrize(
    "arguments, pictures, question",
    [
        ([PICTURE, PICTURE], 2, "Describe the picture."),  # as a shell's *.png gives them
        ([PICTURE, PICTURE, COUNT], 2, COUNT),
        ([PICTURE, COUNT], 1, COUNT),
        ([PICTURE, COUNT, "--image", PICTURE], 2, COUNT),
        ([PICTURE, "--pad", COUNT], 1, COUNT),
        ([PICTURE, "-"], 1, "Hi."),
    ],
)
def test_pictures_and_the_question_after_image(monkeypatch, arguments, pictures, question):
    _, _, err = here(monkeypatch, "--show-prompt", "--max-new-tokens", "1", "--image", *arguments, stdin=b"Hi.")
    assert "<image>\\n" * pictures + question + " ASSISTANT:" in err and err.count("<image>") == pictures


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([PICTURE], "'tiny/example.png' is the name of a file, not a question"),
        (["README.md"], "not a question"),
        (["nothing.png"], "not a question"),
        (["--image", PICTURE, "nothing.png"], "nothing.png: no such picture"),
        (["https://example.org/a.png"], "not a question"),
        (["--image", "-", "--chat"], "--image - reads one picture"),
        (["--image", "-", "-"], "--image - reads one picture"),
        (["--image", "-", "Hi.", "--image", "-"], "--image - reads one picture"),
        (["--image", "-", "Hi."], "this file is not a picture"),
        (["--image", "http://127.0.0.1:1/a.png", "Hi."], "cannot be reached: Connection refused"),
        (["--style", "shouting"], "invalid choice: 'shouting'"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    ],
)
def test_what_is_no_question_or_no_picture(monkeypatch, arguments, words):
    status, out, err = here(monkeypatch, *arguments)
    messages = [line for line in err.splitlines() if line.startswith("sample.py: ")]
    assert (status, out, len(messages)) == (2, "", 1) and words in messages[0]


def test_a_picture_from_standard_input_or_a_file_address(monkeypatch):
    expected = asked(COUNT)[0] + "\n"
    data = Path(PICTURE).read_bytes()
    assert here(monkeypatch, "--image", "-", COUNT, stdin=data)[:2] == (0, expected)
    assert here(monkeypatch, "--image", "file://" + os.path.abspath(PICTURE), COUNT)[:2] == (0, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfHow many things are there?\r\n", b"How many things are there?\r", "How many things are there?\r\n".encode("utf-16"),
        b"\xef\xbb\xbf\r\n How many things are there?\n\n",
    ],
)  # fmt: skip
def test_a_question_from_windows(monkeypatch, data):
    assert here(monkeypatch, "-", stdin=data)[:2] == (0, asked(COUNT)[0] + "\n")
    if not data.startswith(b"\xff"):
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        assert here(monkeypatch, "--chat", stdin=lines)[:2] == (0, asked(COUNT)[0] + "\n")


def test_line_ends_inside_a_question(monkeypatch):
    _, _, err = here(monkeypatch, "-", "--show-prompt", "--max-new-tokens", "1", stdin=b"One?\r\nTwo?\rThree?\r\n")
    assert "One?\\nTwo?\\nThree? ASSISTANT" in err


def test_a_chats_commands(monkeypatch, tmp_path):
    other = tmp_path / "a red picture.png"
    Image.new("RGB", (112, 112), "red").save(other)
    lines = ["Is there a star?", f"/image {other}", "Hi.", "/mark red point 10,10", "What is {mark}?", "/reset", "Hi.", "/help"]
    lines += [f"/image {PICTURE}", f"/image {other}", "/mark red point 10,10", COUNT, "/image", "/image none.png", "/forget", "README.md"]
    status, out, err = here(monkeypatch, "--chat", "--show-prompt", "--max-new-tokens", "1", stdin="\n".join(lines).encode())
    prompts = [line for line in err.splitlines() if "USER:" in line]
    assert [prompt.count("<image>") for prompt in prompts] == [1, 2, 3, 0, 2] and prompts[3].endswith("USER: Hi. ASSISTANT:'")
    assert "/image FILE" in err and status == 2 and len(out.splitlines()) == 5
    for words in ('"/image" needs a file', "none.png: no such picture", "'/forget' is no command", "'README.md' is the name of a file"):
        assert err.count(words) == 1


def test_a_full_context_says_what_to_do(monkeypatch):
    lines = ["Describe the picture."] * 12 + ["/reset", f"/image {PICTURE}", COUNT]
    status, out, err = here(monkeypatch, "--chat", stdin="\n".join(lines).encode())
    assert status == 2 and out.splitlines()[-1] == asked(COUNT)[0]
    assert "tokens: the context is full; /reset begins anew" in err  # an answer that was cut off
    assert "sample.py: the context is full: with this question" in err and '"/reset"' in err


def test_an_answer_that_is_cut_off_says_so(monkeypatch):
    assert "cut off after 3 tokens by --max-new-tokens" in here(monkeypatch, "--max-new-tokens", "3")[2]
    assert "cut off" not in here(monkeypatch)[2]


def test_ctrl_c_during_an_answer_ends_the_answer(monkeypatch):
    """Wherever it comes: while the model computes, or while a word is printed."""
    step, calls = Llava.decode_step, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **options)

    monkeypatch.setattr(Llava, "decode_step", interrupted)
    status, out, err = here(monkeypatch, "--chat", "--show-prompt", stdin=f"Describe the picture.\n{COUNT}\n".encode())
    whole = asked("Describe the picture.")[0]
    first, second = out.splitlines()
    assert status == 0 and whole.startswith(first) and first != whole and "stopped" in err
    assert f"ASSISTANT: {first}</s>USER: {COUNT} ASSISTANT:" in err  # as far as it was said, it is in the conversation
    assert second == asked(COUNT)[0]


def test_a_chat_whose_reader_has_gone_ends_quietly():
    command = f"yes 'Describe the picture.' | {sys.executable} sample.py --chat | head -1"
    done = subprocess.run(["bash", "-c", command + '; echo "${PIPESTATUS[@]}"'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1].split()[1] == "0" and "sample.py:" not in done.stderr and "Error" not in done.stderr


def test_a_chat_format_by_name(monkeypatch):
    _, _, err = here(monkeypatch, "--style", "vip", "--show-prompt", "--max-new-tokens", "1", COUNT)
    assert f"###Human: <image>\\n{COUNT}###Assistant:" in err


def test_the_repetition_penalty_changes_the_answer(monkeypatch):
    plain, penalised = (here(monkeypatch, "--repetition-penalty", penalty)[1] for penalty in ("1", "100"))
    assert plain == asked("Describe the picture.")[0] + "\n" != penalised


def test_deep_greyscale_is_told_and_scaled(monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "_told", set())
    grey = np.asarray(open_image(PICTURE).convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    expected = here(monkeypatch, "--image", tmp_path / "grey8.png", COUNT)
    assert "--scale-grey" not in expected[2]
    assert here(monkeypatch, "--image", tmp_path / "grey16.png", COUNT)[2].count("--scale-grey") == 1
    scaled = here(monkeypatch, "--image", tmp_path / "grey16.png", "--scale-grey", COUNT)
    assert scaled[:2] == expected[:2]


MISTAKES = {
    "no such option": (["--colour"], "--colour"),
    "not a number": (["--max-new-tokens", "many"], "many"),
    "no such model": (["--model", "no/such/folder"], "no/such/folder: no such folder"),
    "model without a name": (["--model", ""], "has no config.json"),
    "not a model": (["--model", "tests"], "config.json"),
    "no such picture": (["--image", "nothing.png"], "nothing.png: no such picture"),
    "not a picture": (["--image", "README.md"], "README.md is not a picture"),
    "no such device": (["--device", "abacus"], "--device abacus"),
    "not that many devices": (["--device", "cpu:1"], "--device cpu:1: PyTorch sees 1"),
    "negative temperature": (["--temperature", "-1"], "temperature is -1.0"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    "less than no tokens": (["--max-new-tokens", "-100"], "max_new_tokens is -100"),
    "half a device": (["--device", "cpu:"], "--device cpu:: expected"),
    "top-p over one": (["--temperature", "1", "--top-p", "1.5"], "top_p is 1.5"),
    "special token typed": (["What does </s> mean?"], "'</s>'"),
    "role typed": (["Yes? ASSISTANT: No."], "'ASSISTANT:'"),
    "not UTF-8": ([b"\xff?"], "not valid Unicode"),
    "empty": ([""], "question is empty"),
    "too long": (["why " * 600], "512"),
    "no such mark": (["--mark", "red blob 1,2"], "no mark is called 'blob'"),
    "mark outside": (["--mark", "red point 113,5", "What is {mark}?"], "at 113,5 lies outside the picture of 112×112"),
    "mark that is not there": (["--mark", "red point 1,2", "What is {mark2}?"], "{mark2}: there is 1 mark"),
    "which mark": (["--mark", "red point 1,2", "--mark", "blue point 1,2", "What is {mark}?"], "{mark}: there are 2 marks: {mark1}"),
    "mark without a picture": (["--model", "tiny/llava", "--mark", "red point 1,2", "What is {mark}?"], "there are 0"),
    "mark on two pictures": (["--mark", "red point 1,2", *["--image", "tiny/example.png"] * 2], "there are 2"),
    "nothing to save": (["--save-marked", "marked.png", "What?"], "there is no --mark"),
    "no such format": (
        ["--mark", "red point 1,2", "--save-marked", "marked.xyz", "What?"],
        "'marked.xyz': cannot be written (KeyError('.xyz'))",
    ),
    "a format without a writer": (["--mark", "red point 1,2", "--save-marked", "marked.psd", "What?"], "'marked.psd': cannot be written"),
    "no name to save": (["--save-marked", "", "What?"], "there is no --mark"),
    "too many pictures": (["--image", "tiny/example.png"] * 8, "max_position_embeddings of 512"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, monkeypatch):
    arguments, words = MISTAKES[mistake]
    if all(isinstance(argument, str) for argument in arguments):
        status, out, err = here(monkeypatch, *arguments)
    else:
        status, out, err = sample(*arguments)
    messages = [line for line in err.splitlines() if line.startswith("sample.py: ")]
    assert (status, out, len(messages)) == (2, "", 1), err
    assert words in messages[0] and "Traceback" not in err
    assert len(err.splitlines()) <= 2  # what was loaded, and the mistake


def test_a_device_with_too_little_memory_is_an_error_before_loading(monkeypatch, capsys):
    import sample as module

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(loading, "free_memory", lambda device: 1e6)
    monkeypatch.setattr(Chat, "from_pretrained", lambda *_: pytest.fail("loaded all the same"))
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "1.0 MB free" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_in_the_middle(error, monkeypatch, capsys):
    import sample as module

    def give_up(*_, **__):
        raise error

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(Chat, "from_pretrained", give_up)
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "ran out of memory" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} sample.py | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize("closed, out", [("--chat <&-", ""), (">&-", ""), ("2>&-", "A\n"), (">&- 2>&-", "")])
def test_a_closed_stream_is_no_error(closed, out):
    command = f"{sys.executable} sample.py --max-new-tokens 1 {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stdout == out


def test_ctrl_c_leaves_a_chat_cleanly():
    process = subprocess.Popen(
        [sys.executable, "sample.py", "--chat"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.stderr.read(1) != b">":  # the prompt: it waits for a question
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and b"Traceback" not in err


def test_a_chat_goes_on_when_memory_runs_out(monkeypatch, capsys):
    """One question is too much; the next ones are answered as if it had not been asked."""
    import sample as module

    chat, asked = Chat.from_pretrained("tiny/llava", dtype=torch.float32), []
    grow = KVCache.grow

    def too_much(cache, length):
        if not asked:
            asked.append(length)
            cache.layers[0].keys = cache.layers[0].keys[:, :, :1]  # half way
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(cache, length)

    monkeypatch.setattr(KVCache, "grow", too_much)
    questions = iter(["Where is the square?", "Where is the star?"])
    monkeypatch.setattr("builtins.input", lambda: next(questions, None) or (_ for _ in ()).throw(EOFError))
    args = module.argument_parser("sample.py", "").parse_args(["--chat", "--max-new-tokens", "100", "Describe the picture."])
    chat_args = [chat, args, [open_image("tiny/example.png")], []]
    for _ in chat.ask("How many things are there?", chat_args[2], max_new_tokens=3):
        pass
    chat_args[2] = []
    args.max_new_tokens = 300
    assert module.converse(*chat_args) == 2
    done = capsys.readouterr()
    assert asked and "ran out of memory" in done.err and done.out.splitlines() == ["On the left.", "At the bottom right."]


def test_an_unknown_error_is_not_hidden():
    import sample as module

    with pytest.raises(RuntimeError, match="something else"):
        module.advice(RuntimeError("something else"))
    assert "gcc" in module.advice(RuntimeError("Failed to find C compiler. Please specify via CC environment variable"))


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ message['role'].upper() + ': ' }}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}", False),
        ("<|im_start|>{{ message['role'] }}", True),
    ],
)
def test_a_chat_template_of_another_format_is_spoken_of(tmp_path, template, told):
    folder = shutil.copytree("tiny/llava", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    status, out, err = sample("--model", str(folder), "--image", "tiny/example.png", "How many things are there?")
    assert (status, out) == (0, "Four.\n") and ("chat_template.jinja" in err) == told and err.count("chat_template.jinja") <= 1
