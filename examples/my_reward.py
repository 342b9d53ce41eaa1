"""A reward of your own, in TRL's convention: any function of prompts, completions and the data's columns.

mezo fit --config configs/quickstart.yaml --model.objective.init_args.reward examples.my_reward.right_and_brief
"""


def right_and_brief(completions: list[str], answers: list[list[str]], **columns: list) -> list[float]:
    """1 for an answer that is in the completion, less 0.1 for every word beyond it; higher is better."""
    del columns
    return [
        float(any(answer.lower() in text.lower() for answer in golds))
        - 0.1 * max(0, len(text.split()) - min(len(answer.split()) for answer in golds))
        for text, golds in zip(completions, answers, strict=True)
    ]
