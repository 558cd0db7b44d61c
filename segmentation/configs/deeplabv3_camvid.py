# DeepLabV3 in small, on CamVid.
_base_ = ["_base_/runtime.py", "_base_/camvid.py"]
model = dict(
    teacher=dict(
        stock="deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py",
        decode_head=dict(dilations=(1, 2, 4, 6)),  # within 12 x 16 cells
    ),
    student=dict(
        stock="deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py",
        decode_head=dict(dilations=(1, 2, 4, 6)),
    ),
)
