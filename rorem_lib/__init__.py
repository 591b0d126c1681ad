"""RORem: a robust object remover trained with humans in the loop (CVPR 2025, arXiv 2501.00740).

One module a stage; the notebooks under `notebooks/` show them at work. Nothing heavy is imported
here, so that `import rorem_lib` costs nothing: import the module you need.
"""

import logging
import os

# torchvision is not needed; transformers would say so three times in every process' log.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# On some CPUs bitsandbytes asks for kernels of 4-bit products, which nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
