# PSPNet in small, on CamVid: minutes on one CPU core. See _base_/camvid.py.
_base_ = ["_base_/runtime.py", "_base_/pair.py", "_base_/camvid.py"]
model = dict(
    teacher=dict(
        stock="pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py",
        pretrained=None,
        backbone=dict(depth=34, base_channels=16, stem_channels=16),
        decode_head=dict(in_channels=128, channels=64),
        auxiliary_head=dict(in_channels=64, channels=32),
    ),
    student=dict(
        stock="pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py",
        pretrained=None,
        backbone=dict(base_channels=8, stem_channels=8),
        decode_head=dict(in_channels=64, channels=32),
        auxiliary_head=dict(in_channels=32, channels=16),
    ),
)
