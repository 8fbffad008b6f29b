"""Reading files into tensors: tables, arrays, images, and the digits that come with scikit-learn; labels of tokens.

:func:`load` makes a :class:`Task` from a file. Its :class:`Encoding` records how the training data became tensors, so
that later files are read in the same way: :func:`load` with ``encoding=`` reads data with targets, and
:func:`load_inputs` reads rows without targets. :mod:`~pyro_bnn.data.corruptions` makes test data worse.
"""

from pyro_bnn.data import corruptions
from pyro_bnn.data.arrays import from_npz
from pyro_bnn.data.digits import digits
from pyro_bnn.data.encoding import ArrayForm, Column, Encoding
from pyro_bnn.data.images import IMAGE_SIZE, from_image_folder, read_image
from pyro_bnn.data.loading import NewRows, load, load_inputs
from pyro_bnn.data.tables import from_csv
from pyro_bnn.data.task import Task
from pyro_bnn.data.tokens import next_token_labels

__all__ = [
    "IMAGE_SIZE",
    "ArrayForm",
    "Column",
    "Encoding",
    "NewRows",
    "Task",
    "corruptions",
    "digits",
    "from_csv",
    "from_image_folder",
    "from_npz",
    "load",
    "load_inputs",
    "next_token_labels",
    "read_image",
]
