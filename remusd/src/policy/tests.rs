//! Policies as files, and what follows from them, as a table.

use super::*;
use crate::ids::{DomId, Generation, ProtectionId};
use crate::protect::options::{AutoInterval, Then};

const UUID: ProtectionId = ProtectionId::from_u128(7);

fn policy(host: &str) -> Policy {
    Policy {
        target: TargetSpec { host: Some(host.into()), ..TargetSpec::default() },
        options: ProtectOptions::default(),
    }
}

fn policies(host: &str) -> BTreeMap<String, Policy> {
    BTreeMap::from([("web".into(), policy(host))])
}

fn seen(domid: u32, up: bool, protection: Protection) -> BTreeMap<String, Seen> {
    BTreeMap::from([("web".into(), Seen { uuid: UUID, domid: DomId(domid), up, protection })])
}

fn stopped(generation: u64) -> Protection {
    Protection::Stopped(Generation(generation))
}

#[test]
fn what_is_begun_follows_from_what_is_seen() {
    for (protection, up, starts, again) in [
        (Protection::None, true, true, false),
        (Protection::None, false, false, true),
        (Protection::Running, true, false, false),
        (Protection::Running, false, false, false),
        (Protection::Lost, true, true, false),
        (Protection::Lost, false, false, true),
        (Protection::Elsewhere, true, false, false),
        (Protection::Elsewhere, false, false, false),
        (stopped(4), true, false, false),
        (stopped(4), false, false, false),
    ] {
        let plan = Planner::default().look(&policies("b"), &seen(3, up, protection));
        assert_eq!((!plan.start.is_empty(), plan.again), (starts, again), "{protection:?}, up {up}");
    }
    let nobody = Planner::default().look(&policies("b"), &BTreeMap::new());
    assert_eq!(nobody, Plan::default(), "a guest that does not run");
    let without = Planner::default().look(&BTreeMap::new(), &seen(3, true, Protection::None));
    assert_eq!(without, Plan::default(), "a guest without a policy");
}

/// One thing that happens, and whether protection begins then.
enum Step {
    Look(u32, Protection, bool),
    LookTowards(&'static str, u32, Protection, bool),
    Ended(Option<TryEnd>),
    Anew,
}

#[test]
fn what_speaks_against_it_holds_for_a_run_and_a_policy() {
    use Step::{Anew, Ended, Look, LookTowards};
    let stories: &[(&str, &[Step])] = &[
        ("ended by hand: until the guest starts anew", &[Look(3, stopped(4), false), Look(5, Protection::None, true)]),
        ("ended by hand, enabled: at once", &[Look(3, stopped(4), false), Anew, Look(3, stopped(4), true)]),
        (
            "ended by hand again after that: once more until it starts anew",
            &[Look(3, stopped(4), false), Anew, Look(3, stopped(4), true), Ended(None), Look(3, stopped(5), false)],
        ),
        (
            "enabled while it is protected: does not excuse a later end",
            &[
                Look(3, Protection::Running, false),
                Anew,
                Look(3, Protection::Running, false),
                Look(3, stopped(4), false),
            ],
        ),
        (
            "refused: until the policy says something else",
            &[
                Look(3, Protection::None, true),
                Ended(Some(TryEnd::Refused)),
                Look(3, Protection::None, false),
                LookTowards("c", 3, Protection::None, true),
            ],
        ),
        (
            "refused: until the guest starts anew",
            &[
                Look(3, Protection::None, true),
                Ended(Some(TryEnd::Refused)),
                Look(3, Protection::None, false),
                Look(4, Protection::None, true),
            ],
        ),
        (
            "aborted: until enabled",
            &[
                Look(3, Protection::None, true),
                Ended(Some(TryEnd::Aborted)),
                Look(3, Protection::None, false),
                Anew,
                Look(3, Protection::None, true),
            ],
        ),
        (
            "lost while a try was refused: the refusal holds",
            &[Look(3, Protection::Lost, true), Ended(Some(TryEnd::Refused)), Look(3, Protection::Lost, false)],
        ),
        (
            "lost again and again: begun again and again",
            &[Look(3, Protection::Lost, true), Ended(None), Look(3, Protection::Lost, true)],
        ),
        (
            "tried: not twice at a time, whatever is seen",
            &[Look(3, Protection::None, true), Look(3, Protection::None, false), Look(4, Protection::None, false)],
        ),
    ];
    for (story, steps) in stories {
        let mut planner = Planner::default();
        for (at, step) in steps.iter().enumerate() {
            let (host, domid, protection, starts) = match step {
                Look(domid, protection, starts) => ("b", *domid, *protection, *starts),
                LookTowards(host, domid, protection, starts) => (*host, *domid, *protection, *starts),
                Ended(how) => {
                    planner.ended("web", *how);
                    continue;
                }
                Anew => {
                    planner.anew("web");
                    continue;
                }
            };
            let plan = planner.look(&policies(host), &seen(domid, true, protection));
            assert_eq!(!plan.start.is_empty(), starts, "{story}: step {at}");
        }
    }
}

#[test]
fn a_policy_taken_away_is_forgotten() {
    let mut planner = Planner::default();
    planner.look(&policies("b"), &seen(3, true, Protection::None));
    planner.ended("web", Some(TryEnd::Refused));
    planner.look(&BTreeMap::new(), &seen(3, true, Protection::None));
    assert_eq!(planner.look(&policies("b"), &seen(3, true, Protection::None)).start, ["web"]);
}

#[test]
fn files_come_back_as_they_were_written_and_wrong_ones_hide_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("domains");
    assert_eq!(read(&folder).0, BTreeMap::new());
    let mut wanted = policy("hostb");
    wanted.options.interval_ms = 50;
    wanted.options.auto_interval = Some(AutoInterval { min_gap_ms: 20, max_interval_ms: 500 });
    wanted.options.then = Then::To("hosta".into());
    wanted.options.unsafe_disks = vec!["xvdb".into()];
    write(&folder, "web", &wanted).unwrap();
    let text = std::fs::read_to_string(path(&folder, "web")).unwrap();
    assert!(text.contains("interval_ms = 50") && !text.contains("detection_ms"), "what is default is left out: {text}");
    assert!(text.contains("[options.auto_interval]\n") && text.contains("min_gap_ms = 20"), "{text}");
    std::fs::write(folder.join("db.toml"), "[target]\nhost = \"b\"\n[options]\nintervall_ms = 5\n").unwrap();
    std::fs::write(folder.join("mail.toml"), "[target]\nhost = \"b\"\n[options]\ninterval_ms = 0\n").unwrap();
    std::fs::write(folder.join("none.toml"), "[target]\n").unwrap();
    let (found, errors) = read(&folder);
    assert_eq!(found, BTreeMap::from([("web".to_owned(), wanted)]));
    let errors: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert!(errors[0].contains("db.toml: line 4") && errors[0].contains("did you mean `interval_ms`?"), "{errors:?}");
    assert!(errors[1].contains("interval-ms is 0"), "{errors:?}");
    assert!(errors[2].contains("exactly one of host"), "{errors:?}");
    assert!(remove(&folder, "web").unwrap() && !remove(&folder, "web").unwrap());
    for name in ["", "../etc", ".x"] {
        assert!(write(&folder, name, &policy("b")).is_err(), "{name}");
    }
}
