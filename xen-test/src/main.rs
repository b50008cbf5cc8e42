//! Nested Xen test harness; `xen-test --help` lists what it does.

fn main() -> std::process::ExitCode {
    xen_test::cli::main()
}
