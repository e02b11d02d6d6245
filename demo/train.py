"""A small real training run over a mounted dataset: which category is a picture from?

Usage: train.py DIR [PICTURES]. Opens PNG pictures below DIR with Pillow, makes 16 x 16 colour
thumbnails, trains a random forest and prints the accuracy on held-out pictures.
"""

import random
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

warnings.simplefilter("ignore")


def features(path):
    with Image.open(path) as picture:
        picture.draft("RGB", (64, 64))
        small = picture.convert("RGBA").resize((16, 16))
    return numpy.asarray(small, dtype=numpy.float32).ravel() / 255


def main():
    root = Path(sys.argv[1])
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else 600
    by_category = {}
    for path in sorted(root.rglob("*.png")):
        by_category.setdefault(path.relative_to(root).parts[0], []).append(path)
    categories = sorted(by_category, key=lambda name: -len(by_category[name]))[:4]
    chosen = [(path, name) for name in categories for path in by_category[name][: limit // 4]]
    random.Random(1).shuffle(chosen)

    begin = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        inputs = list(pool.map(features, [path for path, _ in chosen]))
    loaded = time.monotonic() - begin
    labels = [name for _, name in chosen]
    train_x, test_x, train_y, test_y = train_test_split(inputs, labels, random_state=1)
    model = RandomForestClassifier(n_estimators=100, random_state=1).fit(train_x, train_y)
    print(f"{len(chosen)} pictures of {', '.join(categories)} loaded in {loaded:.1f} s, "
          f"accuracy {model.score(test_x, test_y):.2f} (by chance {1 / len(categories):.2f})")


if __name__ == "__main__":
    main()
