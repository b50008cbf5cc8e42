//! Tries the network buffer on a real kernel with real packets.
//!
//! Run as root on a kernel with sch_plug (Debian's has it as a module) and iproute2. Everything happens in
//! network namespaces of its own; the host's interfaces are not touched. Prints one line per check and closes
//! with `N passed, N failed`; exits with 1 if any failed. Arguments are the beginnings of names of checks to run; `--part I/N` in
//! front of them runs every Nth check only, from the Ith on, so that N kernels share the work.

mod checks;
mod faults;
mod frames;
mod scripted;
mod traffic;
mod world;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

use futures::FutureExt;

/// A check says in words what is wrong.
pub(crate) type Verdict = Result<(), String>;
type Check = fn() -> Pin<Box<dyn Future<Output = Verdict>>>;

/// Under full emulation the slowest takes a few seconds.
const LONGEST: Duration = Duration::from_secs(300);

macro_rules! check {
    ($module:ident :: $name:ident) => {
        (stringify!($name), (|| Box::pin($module::$name())) as Check)
    };
}

fn all() -> Vec<(&'static str, Check)> {
    vec![
        check!(checks::open_while_unarmed),
        check!(checks::held_from_arm_on),
        check!(checks::every_protocol_is_held),
        check!(checks::release_lets_exactly_the_closed_epoch_through),
        check!(checks::buffer_before_release_is_refused),
        check!(checks::abandoned_epoch_goes_with_the_next),
        check!(checks::random_requests_agree_with_the_model),
        check!(checks::overflow_is_counted),
        check!(checks::output_is_told_of_when_it_comes_not_when_it_goes),
        check!(checks::release_lets_held_output_flow_in_order),
        check!(checks::teardown_twice_and_everything_is_put_back),
        check!(checks::failed_setup_puts_everything_back),
        check!(checks::two_guests_do_not_touch_each_other),
        check!(checks::emulated_nic_is_buffered_too),
        check!(checks::latency_of_buffer_and_release),
        check!(traffic::udp_and_tcp_over_ipv4_and_ipv6),
        check!(traffic::tcp_flows_through_epochs),
        check!(traffic::arp_reply_is_held),
        check!(traffic::discard_never_leaks_under_a_flood),
        check!(traffic::release_loses_nothing_under_a_flood),
        check!(traffic::seal_and_unseal_under_a_flood),
        check!(faults::ifb_down_and_up_is_a_reset),
        check!(faults::release_right_after_a_reset),
        check!(faults::queue_length_change_is_a_reset),
        check!(faults::foreign_plug_change_is_replaced),
        check!(faults::foreign_qdisc_is_replaced),
        check!(faults::foreign_filter_removal_is_repaired),
        check!(faults::vif_vanishes),
        check!(faults::ifb_vanishes),
        check!(faults::vif_comes_back_sealed),
        check!(faults::emulated_nic_comes_back_sealed),
        check!(faults::leftovers_are_refused_found_and_removed_after_a_kill),
        check!(faults::leftover_that_was_never_armed),
        check!(faults::seal_made_by_a_script_is_known),
        check!(faults::seal_beside_a_clsact_of_somebody_else),
        check!(faults::foreign_filter_in_our_place_is_named),
        check!(scripted::script_device_is_open_then_holds_every_protocol),
        check!(scripted::script_discard_stays_sealed),
        check!(scripted::script_leftovers_are_recovered),
        check!(scripted::failing_script_says_why),
    ]
}

/// `2/3`: the second of three parts.
fn parse_part(text: &str) -> Option<(usize, usize)> {
    let (part, of) = text.split_once('/')?;
    let (part, of) = (part.parse().ok()?, of.parse().ok()?);
    (1..=of).contains(&part).then_some((part, of))
}

fn main() -> ExitCode {
    let mut wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.first().map(String::as_str) == Some("hold-until-killed") {
        return faults::hold_until_killed(&wanted[1..]);
    }
    let mut part = (1, 1);
    if wanted.first().map(String::as_str) == Some("--part") {
        let Some(asked) = wanted.get(1).and_then(|text| parse_part(text)) else {
            eprintln!("netbuffer-selftest: --part wants I/N with I from 1 to N, such as 1/2");
            return ExitCode::from(2);
        };
        part = asked;
        wanted.drain(..2);
    }
    // Before any other thread exists, so that all of them are in the new namespace.
    if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        eprintln!("netbuffer-selftest needs to be root: a network namespace of its own: {e}");
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("netbuffer-selftest: {e}");
            return ExitCode::from(2);
        }
    };
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in all().into_iter().skip(part.0 - 1).step_by(part.1) {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.starts_with(w.as_str())) {
            continue;
        }
        let start = std::time::Instant::now();
        let run = async { tokio::time::timeout(LONGEST, AssertUnwindSafe(check()).catch_unwind()).await };
        let verdict = match runtime.block_on(run) {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(_)) => Err("panicked".into()),
            Err(_) => Err(format!("not done after {} s", LONGEST.as_secs())),
        };
        let ms = start.elapsed().as_millis();
        match verdict {
            Ok(()) => {
                passed += 1;
                println!("ok   {name} ({ms} ms)");
            }
            Err(why) => {
                failed += 1;
                println!("FAIL {name} ({ms} ms): {why}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0 || passed == 0))
}
