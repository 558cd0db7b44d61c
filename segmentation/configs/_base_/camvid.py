# CamVid laid out like Cityscapes: 367 images to train on, 101 to evaluate on, 240 x 180 pixels, 11 classes that carry
# Cityscapes' train ids, so that its 19 heads read it as it is; narrow networks, minutes on one CPU core.
_base_ = ["pair.py", "cityscapes.py", "schedule_40k_b16.py"]
model = dict(
    teacher=dict(
        pretrained=None,
        backbone=dict(depth=34, base_channels=16, stem_channels=16),
        decode_head=dict(in_channels=128, channels=64),
        auxiliary_head=dict(in_channels=64, channels=32),
    ),
    student=dict(
        pretrained=None,
        backbone=dict(base_channels=8, stem_channels=8),
        decode_head=dict(in_channels=64, channels=32),
        auxiliary_head=dict(in_channels=32, channels=16),
    ),
)
data_root = "data/camvid"
crop_size = (96, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(240, 180), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(num_workers=0, dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(num_workers=0, dataset=dict(dataset=dict(pipeline=test_pipeline)))
batch_size = 4
optim_wrapper = dict(optimizer=dict(lr=0.03))
train_cfg = dict(max_iters=750, val_interval=250)
