"""From the bytes of JPEG files to two augmented channels-last views of each image."""
