"""Exercise 11: preprocessing. From a picture to what the tower was trained on, to the last bit.

1. Any picture to RGB: `images.to_rgb` does it. (It lays transparent ones on white.)
2. With pad=True, to a square whose background is the mean colour, each value as int(255 · mean): `images.pad_to_square`.
3. Resized, bicubic, so that the short side is `self.size` and the long one keeps the proportion, rounded down.
4. The middle square of `self.crop_size` is cut out; where the margin is odd, its first half is the smaller one.
5. Bytes to numbers from 0 to 1, minus the mean, divided by the standard deviation, for each colour.

The tests compare bits, so the order of roundings counts: multiply by 0.00392156862745098 (that is 1/255) in float64, then round
to float32; mean and standard deviation are float32, and so are the difference and the quotient.

The function below becomes `images.ImageProcessor.__call__`. `self` has `size`, `crop_size`, `image_mean` and `image_std`.
"""


def __call__(self, images, pad=False):
    """images: a list of PIL pictures of any mode and size. Returns (N, 3, crop_size, crop_size) float32, contiguous."""
    raise NotImplementedError("exercise 11: preprocess the pictures")
