//! Matching a relation with a target's table.

use super::*;

#[test]
fn types_are_written_with_the_modifier_that_the_source_had() {
    for (type_oid, name, typmod, expected) in [
        (1043, "varchar", 14, "\"varchar\"(10)"),
        (1700, "numeric", 655_366, "\"numeric\"(10,2)"),
        (1184, "timestamptz", 3, "\"timestamptz\"(3)"),
        (1560, "bit", 7, "\"bit\"(7)"),
        (23, "int4", -1, "\"int4\""),
        (20_000, "my types.mood", -1, "\"my types\".\"mood\""),
    ] {
        let column = Column { name: "c".into(), type_oid, type_name: name.into(), typmod, key: false };
        assert_eq!(type_of(&column), expected);
    }
}
