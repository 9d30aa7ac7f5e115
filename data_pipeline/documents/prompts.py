"""The words around a question: the one home of the chat template's wording.

Wording: `configs/` of github.com/baaivision/Emu3.5. `DocumentBuilder` lays tokens out by it, for training documents
and for prompts alike; the text tokenizer's training counts it.
"""

from __future__ import annotations

TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla")
GENERAL = "general"  # talk and questions about pictures: the template without a task
# A document's task as segments keep it, by number; 0: none, as in pretraining.
TASK_NAMES = ("", *TASKS, GENERAL)
# What the released configurations add to the system's words, by task: the model knows the task by it.
TASK_SENTENCES = {"howto": " Please generate a response with interleaved text and images."}
ANSWER = " ASSISTANT: "
NEXT_QUESTION = " USER: "  # of later turns, which the released templates do not have: our choice


def task_number(task: str) -> int:
    """0 for a task that is not ours: it is written into the words, and not counted apart."""
    return TASK_NAMES.index(task) if task in TASK_NAMES else 0


def label(source: str, task: int) -> str:
    """What a dataset's documents of one task are counted under; without a task, the dataset's name."""
    return f"{source} as {TASK_NAMES[task]}" if 0 < task < len(TASK_NAMES) else source


def source_and_task(text: str) -> tuple[str, str]:
    """The two again; the task is empty where there is none."""
    source, mark, task = text.rpartition(" as ")
    return (source, task) if mark and task in TASK_NAMES else (text, "")


def opening(task: str = "", system: str = "") -> str:
    """What a chat begins with; without a task, as guidance has it. `system` stands in place of the system's words."""
    if system:
        return f"{system} USER: "
    if task in ("", GENERAL):
        return "You are a helpful assistant. USER: "
    return f"You are a helpful assistant for {task} task.{TASK_SENTENCES.get(task, '')} USER: "


def around_pictures(task: str, question: str, system: str = "") -> tuple[str, str]:
    """The words before and after the pictures of a question. Only edits show them before the words about them."""
    if task == "x2i":
        return opening(task, system), f"{question}{ANSWER}"
    return f"{opening(task, system)}{question}", ANSWER


# Every template without its question: what the text tokenizer meets in each chat.
EMPTY_PROMPTS = tuple("".join(around_pictures(task, "")) for task in ("", *TASKS))
