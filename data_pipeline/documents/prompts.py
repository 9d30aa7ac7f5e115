"""The words around a question: the one home of the chat template's wording.

Wording: `configs/` of github.com/baaivision/Emu3.5. `DocumentBuilder` lays tokens out by it, for training documents
and for prompts alike; the text tokenizer's training counts it.
"""

from __future__ import annotations

TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla")
# What the released configurations add to the system's words, by task: the model knows the task by it.
TASK_SENTENCES = {"howto": " Please generate a response with interleaved text and images."}
ANSWER = " ASSISTANT: "


def opening(task: str = "") -> str:
    """What a chat begins with; without a task, as guidance has it."""
    if not task:
        return "You are a helpful assistant. USER: "
    return f"You are a helpful assistant for {task} task.{TASK_SENTENCES.get(task, '')} USER: "


def around_pictures(task: str, question: str) -> tuple[str, str]:
    """The words before and after the pictures of a question. Only edits show them before the words about them."""
    if task == "x2i":
        return opening(task), f"{question}{ANSWER}"
    return f"{opening(task)}{question}", ANSWER


# Every template without its question: what the text tokenizer meets in each chat.
EMPTY_PROMPTS = tuple("".join(around_pictures(task, "")) for task in ("", *TASKS))
