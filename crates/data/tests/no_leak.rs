//! Test data can neither be learned from nor chosen by: it does not compile.

#[test]
fn test_data_is_refused_by_the_compiler() {
    trybuild::TestCases::new().compile_fail("tests/no_leak/*.rs");
}
