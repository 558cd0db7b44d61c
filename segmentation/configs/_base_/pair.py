# Teacher and student in one model. ADM's options: core/adm.py; their defaults here: adm_config, segmentation/losses.py
model = dict(
    type="DistillationSegmentor",
    method="dml+adm",
    adm=dict(),
    tau=1.0,  # temperature of mutual learning and distillation
    weight=1.0,  # lambda, theirs
    normalise="all",  # sums over pixels are divided by all of them, as in mmseg; "valid": by those with a label
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
)
