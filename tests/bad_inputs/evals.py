"""Evaluations on tasks."""

import json

from tests.bad_inputs.cases import Call, Command
from tests.bad_inputs.weights import released


def recall(*words, model="<text_run>", tasks="extraction"):
    """Return the words of an evaluation of recall."""
    return ("eval", "recall", f"--model={model}", f"--tasks={tasks}", "--out=<new>", *words)


def rows(content, name="rows.jsonl"):
    """Return what writes a file of rows."""
    return lambda folder: (folder / name).write_bytes(content)


def shard(name, content, sentence, file="rows.jsonl", task="fda"):
    """Return the case of a task whose rows are in a bad file."""
    return Command(name, recall(f"--data={task}=<tmp>/{file}", tasks=task), sentence, rows(content, file))


def choices(*words, tasks="arc_easy"):
    """Return the words of an evaluation of choices."""
    return ("eval", "choices", "--model=<text_run>", f"--tasks={tasks}", *words)


def judged(name, fields, sentence):
    """Return the case of a task of choices whose row has bad fields."""
    row = rows(b'{"question": "q", ' + fields + b"}\n")
    return Command(name, choices("--data=arc_easy=<tmp>/rows.jsonl"), sentence, row)


def perplexity(*words, model="<text_run>"):
    """Return the words of an evaluation by slice."""
    return ("eval", "perplexity", f"--model={model}", *words)


def plotted(name, changed, sentence):
    """Return the case of a plot of a row of recall with a bad value."""
    row = {"id": "a", "model": "m", "fingerprint": "f", "task": "fda", "length": None, "reads": 1, "source": "s"}
    row |= {"max_length": 64, "metric": "contains", "group": "g", "contains": 0.0, "f1": 0.0, "exact": 0.0} | changed
    command = ("eval", "plot", "--rows=<tmp>", "--out=<new>")
    return Command(name, command, sentence, rows(json.dumps(row).encode() + b"\n"))


CASES: tuple[Command | Call, ...] = (
    Command("an evaluation of nothing", ("eval",), "--workdir, or a task; see eval --help."),
    Command("a task behind a run", ("eval", "--workdir=x", "recall"), "--workdir is of a run's own data, and 'recall'"),
    Command("a task that nobody knows", recall(tasks="extraction,squat"), "Unknown task 'squat': did you mean 'squad'"),
    Command("recall of no folder", recall(model="<new>"), "'<new>' is neither a run nor a folder of weights: it"),
    Command("recall of a run on MQAR", recall(model="<mqar_run>"), "needs a run on 'text'"),
    Command("recall without a tokenizer", recall(model="<tmp>"), "names no tokenizer", released(config=b"{}")),
    Command("no length", recall("--lengths=0"), "A length is 0; it is at least 1."),
    Command("a length in words", recall("--lengths=long"), "--lengths has 'long'; it has whole numbers"),
    Command("three readings", recall("--reads=3"), "A document is read 3 times; it is read 1 or 2 times."),
    Command("no examples of recall", recall("--limit=0"), "--limit is 0; it is at least 1."),
    Command("no batch", recall("--batch-size=0"), "batch_size is 0; it is at least 1."),
    Command("no room for a document", recall("--max-length=48"), "max_length is 48; it is more than the 48 tokens"),
    Command("data of no task", recall("--data=fdb=x"), "Unknown set 'fdb': did you mean 'fda'?"),
    Command("data of what is made up", recall("--data=phonebook=x"), "Unknown set 'phonebook'"),
    Command("a task without its data", recall("--data=fda"), "--data is 'fda'; it is TASK=SOURCE"),
    Command("data that are not there", recall("--data=extraction=<new>"), "Data '<new>' cannot be read: No such file"),
    Command("data of another kind", recall("--data=extraction=<mqar.py>"), "has no file of rows; their names end in"),
    Command(
        "a needle without room",
        recall("--lengths=60", tasks="extraction,niah_single_1"),
        "tokens at least, and there is",
    ),
    shard("a shard that is no JSON", b'{"text": "a"}\n{"te', "Line 2 of data file '<tmp>/rows.jsonl' is no JSON"),
    shard("a shard that is cut short", b"\xfd7zXZ\x00\x00", "rows.jsonl.xz' cannot be read", "rows.jsonl.xz"),
    shard("a shard that is no parquet", b"PAR1", "rows.parquet' cannot be read", "rows.parquet"),
    shard("a shard in Latin-1", b'{"text": "\xe9"}\n', "rows.jsonl' is not UTF-8 text"),
    shard("an empty shard", b"", "has no rows."),
    shard("rows without a key", b'{"text": "a"}\n', "Row 1 of '<tmp>/rows.jsonl' has no 'key' of the right kind"),
    shard(
        "rows without answers",
        b'{"text": "a", "key": "k", "value": " "}\n',
        "has no row with a document and an answer.",
    ),
    shard(
        "rows without documents",
        b'{"text": " ", "key": "k", "value": "v"}\n',
        "has no row with a document and an answer.",
        task="extraction",
    ),
    Command("choices of no task", choices(tasks="arc"), "Unknown task 'arc'"),
    Command("choices without rows", choices(tasks="piqa"), "'piqa' has no rows here; give them by --data=piqa=FILE."),
    Command("no rows of choices", choices("--limit=0"), "--limit is 0; it is at least 1."),
    Command(
        "rows of another set", choices("--data=arc_easy=<tmp>/rows.jsonl"), "has no 'question'", rows(b'{"a": 1}\n')
    ),
    Command("a seed of recall below 0", recall("--seed=-1"), "--seed is -1; it is at least 0."),
    Command("data of a task that is not asked", recall("--data=fda=x"), "'fda', which is none of --tasks: extraction."),
    Command("data twice", recall(*["--data=extraction=x"] * 2), "--data has 'extraction' twice; a task has one"),
    shard(
        "answers of no kind",
        b'{"context": "a", "question": "b", "answers": {"text": 5}}\n',
        "Row 1 of '<tmp>/rows.jsonl' has no 'answers' of the right kind",
        task="squad_questions",
    ),
    judged("a label in letters", b'"choices": ["a", "b"], "label": "A"', "has no 'label' of the right kind; a row"),
    judged("a label of no choice", b'"choices": ["a", "b"], "label": 7', "has label 7, which is none of its 2"),
    judged("choices by name", b'"choices": {"text": ["a"]}, "label": 0', "has no 'choices' of the right kind; a row"),
    judged("no choices", b'"choices": [], "label": 0', "has label 0, which is none of its 0 choices."),
    judged("an empty choice", b'"choices": ["a", ""], "label": 0', "Row 1 of '<tmp>/rows.jsonl' has an empty text"),
    Command(
        "a sentence without a gap",
        choices("--data=winogrande=<tmp>/rows.jsonl", tasks="winogrande"),
        "Row 1 of '<tmp>/rows.jsonl' has an empty text to judge",
        rows(b'{"sentence": "a", "option1": "a", "option2": "b", "answer": "1"}\n'),
    ),
    Command("choices in another tokenizer's ids", choices("--tokenizer=gpt2"), "; the model knows ids 0 to 256."),
    Command("no batch of choices", choices("--batch-size=0"), "--batch-size is 0; it is at least 1."),
    Command("no length of choices", choices("--max-length=0"), "--max-length is 0; it is at least 1."),
    Command("windows of nothing", perplexity("--length=0"), "stride is 1 and length 0; they are 1 <= stride"),
    Command("a stride of nothing", perplexity("--stride=0"), "stride is 0 and length 32; they are 1 <= stride"),
    Command("no batch of windows", perplexity("--batch-size=0"), "--batch-size is 0; it is at least 1."),
    Command("slices as a picture", perplexity("--out=<new>.png"), "--out is '<new>.png'; its name ends in .csv."),
    Command("a model in another dtype", recall("--dtype=int8"), "dtype"),
    Command("perplexity of MQAR", perplexity(model="<mqar_run>"), "needs a run on 'text'"),
    Command("no stride", perplexity("--stride=-1"), "stride is -1 and length 32; they are 1 <= stride <= length."),
    Command("no rare pair", perplexity("--rare=-1"), "rare is -1; it is at least 0."),
    Command("slices into a folder", perplexity("--out=<tmp>"), "'<tmp>' is a folder; it is a file"),
    Command("a corpus that is not there", perplexity("--data=<new>"), "<new>"),
    Command("a plot of no rows", ("eval", "plot", "--rows=<new>", "--out=<new>"), "no rows of recall to draw"),
    Command(
        "a plot of other rows",
        ("eval", "plot", "--rows=<tmp>", "--out=<new>"),
        "Row 'a' of '<tmp>' is none of `eval recall`: it has no 'model'.",
        rows(b'{"id": "a"}\n'),
    ),
    plotted("a plot of an unknown task", {"task": "zzz"}, "is none of `eval recall`: its task is 'zzz'."),
    plotted("a plot of a score in words", {"contains": "x"}, "is none of `eval recall`: its contains is 'x'."),
)
