"""Writes a contact sheet of synthetic faces.

python -m training.data.synthetic_faces --out grid.png --rows 4 --columns 8 --first-seed 0
"""

import argparse

from PIL import Image

from training.data.synthetic_faces.drawing import HEIGHT, WIDTH
from training.data.synthetic_faces.render import render_face


def main(argv: list[str] | None = None) -> None:
    """Writes a contact sheet of faces with consecutive seeds, row by row."""
    parser = argparse.ArgumentParser(description="Render a contact sheet of synthetic faces.")
    parser.add_argument("--out", required=True, help="image file to write, for example grid.png")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args(argv)
    sheet = Image.new("RGB", (args.columns * WIDTH, args.rows * HEIGHT))
    for i in range(args.rows * args.columns):
        face = Image.fromarray(render_face(args.first_seed + i))
        sheet.paste(face, (i % args.columns * WIDTH, i // args.columns * HEIGHT))
    sheet.save(args.out)
    print(f"{args.rows * args.columns} faces from seed {args.first_seed} -> {args.out}")


if __name__ == "__main__":
    main()
