use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn auto(min_gap_ms: u64, max_interval_ms: u64) -> Pace {
    let auto_interval = Some(AutoInterval { min_gap_ms, max_interval_ms });
    Pace::new(&ProtectOptions { auto_interval, ..ProtectOptions::default() })
}

/// An epoch whose suspend was asked for at `asked`, in milliseconds from `zero`.
fn epoch(zero: Instant, asked: u32, stalled: u32, shipped: u32, pages: u64) -> Released {
    Released {
        now: zero + (asked + stalled + shipped) * MS,
        suspend_asked: zero + asked * MS,
        resumed: zero + (asked + stalled) * MS,
        shipped: shipped * MS,
        pages,
    }
}

/// After an epoch that began to run at 0, was asked to suspend at 100, and took `stalled` and `shipped` ms.
fn due(pace: &mut Pace, stalled: u32, shipped: u32, pages: u64) -> (u128, CutBy) {
    let zero = Instant::now();
    pace.past = None;
    pace.released(epoch(zero, 0, 0, 0, 0));
    pace.released(epoch(zero, 100, stalled, shipped, pages));
    let (at, by) = pace.due().unwrap();
    (at.duration_since(zero).as_millis(), by)
}

#[test]
fn a_fixed_interval_is_that_and_only_a_disk_cuts_it_short() {
    let mut pace = Pace::new(&ProtectOptions::default());
    assert_eq!(pace.due(), None);
    pace.output_waits();
    assert_eq!(due(&mut pace, 80, 20, 100_000), (400, CutBy::Timer));
    pace.disk_waits();
    assert_eq!(pace.due().unwrap().1, CutBy::Disk);
}

#[test]
fn when_an_epoch_ends() {
    use CutBy::*;
    // Output waits, stalled and shipped in ms, pages; when the next suspend is, the guest's resume being at 100 + stalled.
    let table = [
        ("quiet", false, 20, 10, 100, (130 + 500, Timer)),
        ("the gap from the release", true, 20, 30, 100, (150 + 5, Output)),
        ("as long as it stood still", true, 80, 30, 100, (180 + 80, Output)),
        ("a checkpoint longer than the longest interval", false, 900, 10, 100, (1000 + 900, Timer)),
        ("and then output is no later", true, 900, 10, 100, (1000 + 900, Output)),
        // 10,000 pages in 100 ms, 100 of them shipped in a ms: 250 ms are 25,000 pages, too far from what was seen.
        ("much, shipped fast", false, 20, 100, 10_000, (220 + 500, Timer)),
        // 40 of them in a ms: 10,000 pages are as many as there were, in 100 ms, over before its release.
        ("much, shipped slowly", false, 20, 250, 10_000, (370 + 5, Pages)),
        ("half of what is too much: in twice the time", false, 20, 125, 10_000, (120 + 200, Pages)),
        ("few pages, however slowly", false, 20, 500, 2000, (620 + 500, Timer)),
    ];
    for (what, output, stalled, shipped, pages, expected) in table {
        let mut pace = auto(5, 500);
        if output {
            pace.output_waits();
        }
        assert_eq!(due(&mut pace, stalled, shipped, pages), expected, "{what}");
    }
}

#[test]
fn half_of_the_budget_ends_an_epoch() {
    let auto_interval = Some(AutoInterval { min_gap_ms: 5, max_interval_ms: 60_000 });
    let mut pace = Pace::new(&ProtectOptions { auto_interval, epoch_budget: 64 << 20, ..ProtectOptions::default() });
    assert_eq!(due(&mut pace, 10, 10, 6000), (110 + 136, CutBy::Pages), "8192 pages at 60 a ms");
}

#[test]
fn cuts_are_counted_by_their_reason_and_the_mean_is_over_the_latest() {
    let zero = Instant::now();
    let mut pace = auto(5, 500);
    pace.cut(zero);
    assert_eq!(pace.report(), &IntervalReport { auto: true, ..IntervalReport::default() }, "nothing was released");
    for nth in 0..40_u32 {
        let one = epoch(zero, nth * 1000, 10, 10, 10);
        pace.released(one);
        let gap = match nth {
            0..20 => 500 * MS,
            _ => {
                pace.output_waits();
                5 * MS
            }
        };
        assert_eq!(pace.due().unwrap().0, one.now + gap);
        pace.cut(one.now + gap);
        pace.closed();
    }
    pace.released(epoch(zero, 50_000, 10, 10, 10));
    pace.disk_waits();
    pace.cut(zero + 50_020 * MS);
    pace.released(epoch(zero, 51_000, 10, 10, 10));
    assert_eq!(pace.due().unwrap().1, CutBy::Timer, "what was said of the epoch before does not count");
    let report = pace.report();
    assert_eq!((report.by_timer, report.by_output, report.by_disk), (20, 20, 1));
    assert_eq!(report.mean_ms, Some(4), "(15 * 5 + 0) / 16");
}

proptest! {
    /// Whatever comes when: the guest runs at least half of the time, the gap is kept, and a quiet guest's output is not let wait for
    /// longer than the longest interval and its rest.
    #[test]
    fn the_guest_runs_at_least_half_of_the_time(
        min in 1_u64..100,
        more in 0_u64..2000,
        epochs in proptest::collection::vec((1_u32..2000, 0_u32..500, 0_u64..200_000, proptest::option::of(0_u32..3000)), 1..60),
    ) {
        let mut pace = auto(min, min + more);
        let zero = Instant::now();
        let mut asked = zero;
        let (mut still, mut run, mut longest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        for (stalled, shipped, pages, output) in epochs {
            let resumed = asked + stalled * MS;
            let now = resumed + shipped * MS;
            pace.closed();
            pace.released(Released { now, suspend_asked: asked, resumed, shipped: shipped * MS, pages });
            let (mut at, _) = pace.due().unwrap();
            if let Some(output) = output {
                let told = resumed + output * MS;
                // Told after the suspend it is the next epoch's.
                if told < at {
                    pace.output_waits();
                    let (sooner, by) = pace.due().unwrap();
                    prop_assert!(sooner <= at && by != CutBy::Timer);
                    at = sooner.max(told);
                }
            }
            prop_assert!(at >= now + min as u32 * MS);
            prop_assert!(at >= resumed + stalled * MS);
            prop_assert!(at <= (now + (min + more) as u32 * MS).max(resumed + stalled * MS));
            pace.cut(at);
            still += stalled * MS;
            run += at - resumed;
            longest = longest.max(stalled * MS);
            asked = at;
        }
        prop_assert!(still <= run);
        let report = pace.report();
        prop_assert!(report.mean_ms.is_some() && report.by_disk == 0);
    }
}
