"""`python -m pneumo.synthetic`: phantom chest X-rays in Kaggle's layout."""

import sys

from pneumo.dataset.phantoms.source_folder import main

if __name__ == "__main__":
    sys.exit(main())
