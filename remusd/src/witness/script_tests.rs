//! The script store against real programs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{CasReply, ReadError};
use super::config::ScriptConfig;
use super::record::{Record, RecordState as S, Versioned};
use super::rules_tests::{DOMAIN, attempt, host, record};
use super::script::ScriptStore;
use super::store::WitnessStore;

pub(super) fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    // A script that another thread's child still has open for writing cannot be executed, so it is written under another name.
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
    let copied = std::process::Command::new("cp").arg(&new).arg(&path).status().unwrap();
    assert!(copied.success());
    path
}

fn script(dir: &Path, text: &str, timeout_ms: u64) -> ScriptStore {
    let path = write(dir, "script", &format!("#!/bin/sh\n{text}\n"));
    ScriptStore::new(&ScriptConfig { path, timeout_ms }).unwrap()
}

fn at(record: Option<Record>) -> Versioned {
    Versioned { record, position: super::Position { store: "script".into(), revision: 0, modified: 0 } }
}

fn claimed() -> Record {
    Record { owner: host(2, "b"), peer: host(1, "a"), attempt: attempt(2), ..record(S::Claimed) }
}

#[tokio::test]
async fn exit_codes_and_the_printed_holder_decide() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (at(Some(record(S::Armed))), claimed());
    let print = |r: &Record, code: u8| format!("printf %s '{}'; exit {code}", r.to_json());
    let cas = async |text: &str| script(dir.path(), text, 5000).cas(DOMAIN, &old, &new).await;
    assert!(matches!(cas(&print(&new, 0)).await, CasReply::Applied(_)));
    assert_eq!(cas(&print(&record(S::Armed), 1)).await, CasReply::Conflict);
    assert!(matches!(cas(&print(&record(S::Armed), 0)).await, CasReply::Unknown(t) if t.contains("another holder")));
    assert!(matches!(cas("exit 0").await, CasReply::Unknown(_)), "won, but printed nobody");
    assert!(matches!(cas("echo no quorum >&2; exit 2").await, CasReply::Unknown(t) if t.contains("no quorum")));
    assert!(matches!(cas("kill -9 $$").await, CasReply::Unknown(_)));
    let read = async |text: &str| script(dir.path(), text, 5000).read(DOMAIN).await;
    assert_eq!(read("exit 0").await, Ok(at(None)));
    assert_eq!(read(&print(&new, 0)).await, Ok(at(Some(new.clone()))));
    assert!(matches!(read(&print(&new, 1)).await, Err(ReadError::Unavailable(_))));
    assert!(matches!(read("echo who knows").await, Err(ReadError::Unreadable(_))));
    assert!(script(dir.path(), "test $1 = probe && test $# = 1", 5000).probe().await.is_ok());
    assert!(script(dir.path(), "echo gone >&2; exit 1", 5000).probe().await.unwrap_err().contains("gone"));
}

#[tokio::test]
async fn it_is_told_the_whole_change_and_whom_to_fence() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = format!(
        r#"echo "$*|$REMUS_STATE|$REMUS_OWNER|$REMUS_PEER|$REMUS_FENCE|$REMUS_EXPECTED" > {}; printf %s "$REMUS_NEW""#,
        out.display()
    );
    let store = script(dir.path(), &text, 5000);
    let armed = record(S::Armed);
    let back = |state| Record { attempt: attempt(2), ..record(state) };
    let forced = Record { generation: crate::ids::Generation(6), ..claimed() };
    for (old, new, fence) in [
        (Some(armed.clone()), claimed(), "a"),
        (Some(armed.clone()), back(S::Claimed), "b"),
        (Some(record(S::HandedTo)), claimed(), ""),
        (Some(record(S::HandedTo)), back(S::Claimed), "b"),
        (Some(record(S::Forfeited)), claimed(), ""),
        (Some(record(S::Stopped)), back(S::Claimed), ""),
        (Some(record(S::Active)), forced.clone(), "a"),
        (None, forced, "a"),
        (Some(armed.clone()), back(S::Stopped), ""),
        (None, armed, ""),
    ] {
        assert!(matches!(store.cas(DOMAIN, &at(old.clone()), &new).await, CasReply::Applied(_)));
        let want = format!(
            "swap {DOMAIN}|{}|{}|{}|{fence}|{}\n",
            serde_json::to_value(new.state).unwrap().as_str().unwrap(),
            new.owner,
            new.peer,
            old.map(|r| r.to_json()).unwrap_or_default()
        );
        assert_eq!(std::fs::read_to_string(&out).unwrap(), want);
    }
}

#[tokio::test]
async fn a_slow_one_is_killed_with_its_children_and_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    let text = format!("sleep 600 & echo $! >> {0}; echo $$ >> {0}; wait", pids.display());
    let store = script(dir.path(), &text, 500);
    let reply = store.cas(DOMAIN, &at(Some(record(S::Armed))), &claimed()).await;
    assert!(matches!(reply, CasReply::Unknown(t) if t.contains("killed after 500 ms")));
    for pid in std::fs::read_to_string(&pids).unwrap().lines() {
        let mut backoff =
            crate::ops::Backoff::new(Duration::from_millis(5), Duration::from_millis(100), Duration::from_secs(5))
                .unwrap();
        let stat = PathBuf::from(format!("/proc/{pid}/stat"));
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
            backoff.wait().await.expect("the process is still there");
        }
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let new =
        |path: &str| ScriptStore::new(&ScriptConfig { path: path.into(), timeout_ms: 1000 }).unwrap_err().to_string();
    assert!(new("relative").contains("not absolute"));
    assert!(new("/no/such/script").contains("/no/such/script"));
}
