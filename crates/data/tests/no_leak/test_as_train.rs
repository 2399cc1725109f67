use cliptune_core::Labelled;
use cliptune_data::FewShot;

fn learn_from_test(drawn: FewShot) -> Labelled {
    Labelled {
        train: drawn.test,
        val: drawn.labelled.val,
        classes: drawn.labelled.classes,
    }
}

fn choose_by_test(drawn: FewShot) -> Labelled {
    Labelled {
        train: drawn.labelled.train,
        val: Some(drawn.test),
        classes: drawn.labelled.classes,
    }
}

fn main() {}
