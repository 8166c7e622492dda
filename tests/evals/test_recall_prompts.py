"""A hand-checked prompt of each task, as based-evaluation-harness and prefix-linear-attention make them."""

import json

import pytest

from based_jax.data.tokenizer import ByteTokenizer, get_tokenizer
from based_jax.errors import UserError
from based_jax.evals.prompts import Document, cut
from based_jax.evals.recall_tasks import TASKS, Part, Selection, SetTask, check_rows, examples_of, parts_of
from based_jax.evals.sets import read_rows

KEYED = {"text": "Drama film. Directed by Ann Lee.\n director:", "key": "director", "value": " Ann Lee\n"}
COMPLETED = {
    "text": " Paris is in France. Paris lies in ",
    "value": "France",
    "context": "Title: Paris Background: Paris is in France. Question: Where?",
    "question": "Where is Paris?",
}
CLOZE = {
    "context": "[DOC] [TLE] Paris [PAR] It is in France. Paris lies in",
    "question": "Paris lies in",
    "orig_question": "where is paris:",
    "answers": ["France", "the French Republic", "France"],
}
ASKED = {
    "title": "New_York",
    "context": "It has 5 boroughs.",
    "question": "How many boroughs?",
    "answers": {"text": ["5", " "], "answer_start": [7, 0]},
}
EXPECTED = {
    "swde": (
        KEYED | {"text": "Drama film. Directed by Ann Lee. Summary of information above... director:"},
        "Drama film. Directed by Ann Lee. Summary of information above... director:",
        "Information about Director. Drama film. Directed by Ann Lee.\nDrama film. Directed by Ann Lee. Director:",
        ("Ann Lee",),
    ),
    "fda": (
        KEYED,
        "Drama film. Directed by Ann Lee.\n director:",
        "Information about Director. Drama film. Directed by Ann Lee.\nDrama film. Directed by Ann Lee. Director:",
        ("Ann Lee",),
    ),
    "extraction": (
        KEYED | {"text": "MTU 1500\nup 3 days\n", "key": "mtu", "value": "1500"},
        "MTU 1500\nup 3 days. Mtu:",
        "Information about Mtu. MTU 1500\nup 3 days.\nMTU 1500\nup 3 days. Mtu:",
        ("1500",),
    ),
    "squad": (
        COMPLETED,
        "Paris is in France. Paris lies in",
        "Where is Paris? Title: Paris Background: Paris is in France. \nParis is in France. Paris lies in",
        ("France",),
    ),
    "squad_questions": (
        ASKED,
        "Title: New York\n\nBackground: It has 5 boroughs.\n\nQuestion: How many boroughs?\n\nAnswer:",
        "How many boroughs? It has 5 boroughs.\n"
        "Title: New York\n\nBackground: It has 5 boroughs.\n\nQuestion: How many boroughs?\n\nAnswer:",
        ("5",),
    ),
    **dict.fromkeys(
        ("nq_512", "nq_1024", "nq_2048", "triviaqa", "drop"),
        (
            CLOZE,
            "Paris  It is in France. Paris lies in",
            "where is paris Paris  It is in France.\nParis  It is in France. Paris lies in",
            ("France", "the French Republic"),
        ),
    ),
}


def test_each_task_has_its_prompts_here():
    assert EXPECTED.keys() == {name for name, task in TASKS.items() if isinstance(task, SetTask)}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_row_read_once_and_twice(name):
    row, once, twice, answers = EXPECTED[name]
    task = TASKS[name]
    assert set(task.fields) <= row.keys()
    document = task.document(row)
    assert (task.once(document), task.twice(document), document.answers) == (once, twice, answers)


def test_a_context_is_cut_around_the_first_answer():
    """50 of 70 bytes are for the question; 10 stand before the answer, and 10 from its first byte on."""
    context = "." * 30 + "abcdefghijkl" + "NEEDLE" + "mnopqrstuvwxyz"
    document = Document(context, "Which?", ("missing", "needle"), text=context)
    assert cut(document, 70, ByteTokenizer()).context == "cdefghijkl" + "NEEDLE" + "mnop"
    assert cut(document, 70, ByteTokenizer()).text == ""
    early = Document("NEEDLE and " + "x" * 40, "Which?", ("NEEDLE",))
    assert cut(early, 70, ByteTokenizer()).context == "NEEDLE and xxxxxxxxx"
    absent = Document("x" * 40 + "0123456789", "Which?", ("none",))
    assert cut(absent, 70, ByteTokenizer()).context == "0123456789"
    whole = Document("short", "Which?", ("or",))
    assert cut(whole, 512, ByteTokenizer()).context == "short"


def test_cuts_count_tokens_of_the_tokenizer():
    tokenizer = get_tokenizer("gpt2")
    rows = read_rows(TASKS["squad_questions"].source)
    for row in rows[:20]:
        document = TASKS["squad_questions"].document(row)
        found = cut(document, 114, tokenizer)
        assert any(answer in found.context for answer in document.answers)
        assert 32 <= len(tokenizer.encode(found.context)) <= 66  # 64, which meet their neighbours otherwise


def test_samples_have_their_answers_and_groups():
    selection = Selection(ByteTokenizer(), limit=60)
    for name in ("extraction", "squad_questions"):
        found = examples_of(Part(name), selection)
        assert len(found) == 60 and all(example.answers[0] in example.prompt for example in found)
        assert found == examples_of(Part(name), selection)
        assert {x.id for x in examples_of(Part(name), Selection(ByteTokenizer(), limit=20))} < {x.id for x in found}
    assert len({x.group for x in found}) < 60


def test_rows_without_a_document_or_an_answer_are_left_out_with_a_word(tmp_path, caplog):
    rows = [KEYED | change for change in ({}, {"text": " \n"}, {"value": " "}, {"value": "x"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {name: str(tmp_path / "rows.jsonl") for name in ("fda", "extraction")}
    for name in data:
        found = examples_of(Part(name), Selection(ByteTokenizer(), data))
        assert [(x.id, x.answers) for x in found] == [("0", ("Ann Lee",)), ("3", ("x",))]
    check_rows([Part(name) for name in data], data)
    assert caplog.text.count("2 of 4 rows have no answer or no document: left out") == 2
    check_rows([Part("extraction")], {})
    assert caplog.text.count("left out") == 2


def test_parts_are_tasks_at_lengths_and_readings():
    tasks = ["fda", "squad", "phonebook"]
    assert [x.name for x in parts_of(tasks, [], [1], 99)] == ["fda", "squad", "phonebook@99"]
    found = [x.name for x in parts_of(tasks, [512, 1024], [1, 2], 99)]
    assert found == [
        *("fda@512", "fda@512 twice", "fda@1024", "fda@1024 twice"),
        *("squad", "squad twice", "phonebook@512", "phonebook@1024"),
    ]


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", lambda path: path.write_text('{"a": 1}\n\n{"a": 2}\n')),
        (".parquet", lambda path: __import__("pandas").DataFrame({"a": [1, 2]}).to_parquet(path)),
    ],
)
def test_rows_of_a_file_a_folder_and_the_hub_are_the_same(suffix, write, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / f"validation-0{suffix}")
    (tmp_path / "set" / "train.jsonl").write_text('{"a": 9}\n')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / name))
    for source in (tmp_path / "set" / f"validation-0{suffix}", tmp_path / "set", "hub:set"):
        monkeypatch.chdir(tmp_path)
        assert read_rows(str(source)) == [{"a": 1}, {"a": 2}]


def test_a_set_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: 1 / 0)
    with pytest.raises(UserError, match=r"'hazyresearch/based-fda' cannot be fetched .* --data=TASK=FILE\."):
        examples_of(Part("fda"), Selection(ByteTokenizer()))
