//! The example scripts do what the contract says, with stand-ins for the tools that they call.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{CasReply, Outcome};
use super::config::ScriptConfig;
use super::keeper::{Answer, Keeper};
use super::record::{Record, RecordState as S};
use super::rules_tests::{DOMAIN, record};
use super::script::ScriptStore;
use super::script_tests::write;
use super::store::WitnessStore;
use crate::ids::Generation;
use crate::state::StateDir;

const LIMIT: Duration = Duration::from_secs(20);

/// The example, with `dir/bin` before everything else on its path and a configuration in `dir`.
fn example(dir: &Path, name: &str) -> ScriptStore {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/witness").join(name);
    let (dir, script) = (dir.display(), script.display());
    let text = format!(
        "#!/bin/sh\nPATH={dir}/bin:$PATH REMUS_WITNESS_CONF={dir}/conf T={dir}\nexport PATH REMUS_WITNESS_CONF T\nexec {script} \"$@\"\n"
    );
    let path = write(Path::new(&dir.to_string()), "wrapper", &text);
    ScriptStore::new(&ScriptConfig { path, timeout_ms: 10_000 }).unwrap()
}

fn tool(dir: &Path, name: &str, text: &str) {
    std::fs::create_dir_all(dir.join("bin")).unwrap();
    write(&dir.join("bin"), name, &format!("#!/bin/sh\n{text}\n"));
}

fn won(answer: Answer) -> Record {
    match answer {
        Answer::Settled(Outcome::Won(r)) => *r,
        other => panic!("{other:?}"),
    }
}

fn fenced(dir: &Path) -> Vec<String> {
    std::fs::read_to_string(dir.join("fenced")).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Arm, fail to fence, claim, lose, hand over: over any of the examples. `break_fence` makes fencing fail or work.
async fn life(dir: &Path, name: &str, break_fence: impl Fn(bool)) {
    let keeper = |side: &str| {
        let state = StateDir::open(dir.join(side)).unwrap();
        // Both test hosts have this machine's name; that is also whom they fence.
        Keeper::start(DOMAIN, std::sync::Arc::new(example(dir, name)), &state, None).unwrap().0
    };
    let (a, b) = (keeper("a"), keeper("b"));
    example(dir, name).probe().await.unwrap();
    let key = won(a.arm(b.me().clone(), Generation(1), false, LIMIT).await).key();
    won(b.accept(key, LIMIT).await);
    assert_eq!(fenced(dir), [""; 0], "arming fences nobody");
    break_fence(true);
    let Answer::Unknown(why) = b.claim(key, Duration::from_secs(2)).await else { panic!("nobody was fenced") };
    assert!(!why.is_empty());
    let Answer::Settled(Outcome::Seen(r)) = a.look(LIMIT).await else { panic!() };
    assert_eq!(r.state, S::Armed);
    break_fence(false);
    won(b.claim(key, LIMIT).await);
    assert_eq!(fenced(dir).last(), Some(&a.me().name));
    won(b.activate(key, LIMIT).await);
    let times = fenced(dir).len();
    assert!(matches!(a.claim(key, LIMIT).await, Answer::Settled(Outcome::Lost(r)) if r.state == S::Active));
    let key = won(b.arm(a.me().clone(), Generation(1), true, LIMIT).await).key();
    won(b.hand_to(key, LIMIT).await);
    won(a.claim(key, LIMIT).await);
    assert_eq!(fenced(dir).len(), times, "a planned move fences nobody, nor does a claim that is lost already");
    // Somebody else's swap against what is not there any more.
    let store = example(dir, name);
    let mut old = store.read(DOMAIN).await.unwrap();
    old.record = Some(record(S::Active));
    assert_eq!(store.cas(DOMAIN, &old, &record(S::Stopped)).await, CasReply::Conflict);
}

#[tokio::test(flavor = "multi_thread")]
async fn pacemaker() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    tool(dir, "cibadmin", r#"[ ! -e $T/no-quorum ] && echo '<cib have-quorum="1"/>'"#);
    // As crm_attribute 2.1.5: 105 if there is no such property.
    tool(
        dir,
        "crm_attribute",
        r#"[ "$1 $2 $3" = "--type crm_config --name" ] || exit 64
           case $5 in
           --query) [ -e "$T/$4" ] || exit 105; cat "$T/$4" ;;
           --update) printf %s "$6" > "$T/$4" ;;
           *) exit 64 ;;
           esac"#,
    );
    tool(dir, "stonith_admin", r#"[ "$1" = --fence ] && [ ! -e $T/broken ] && echo "$2" >> $T/fenced"#);
    life(dir, "pacemaker", |broken| set(dir, "broken", broken)).await;
    set(dir, "no-quorum", true);
    let store = example(dir, "pacemaker");
    assert!(store.probe().await.unwrap_err().contains("no quorum"));
    assert!(store.read(DOMAIN).await.is_err(), "no quorum is not absent");
}

fn set(dir: &Path, name: &str, there: bool) {
    let path = dir.join(name);
    if there { std::fs::write(path, "").unwrap() } else { drop(std::fs::remove_file(path)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn fence_agent() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let folder = dir.join("folder");
    std::fs::create_dir(&folder).unwrap();
    set(&folder, "remusd-witness", true);
    let devices = dir.join("fence.d");
    std::fs::create_dir(&devices).unwrap();
    let host = crate::link::handshake::host_name();
    std::fs::write(devices.join(&host), format!("ip=192.0.2.1\nplug={host}\n")).unwrap();
    // As the agents: options on standard input; status is 0 when on, 2 when off.
    tool(
        dir,
        "fence_fake",
        r#"while IFS='=' read -r key value; do eval "$key=\$value"; done
           case $action in
           off) [ -e $T/broken ] || echo "$plug" >> $T/fenced ;;
           status) if [ -e $T/broken ]; then exit 0; else exit 2; fi ;;
           esac"#,
    );
    let conf = format!("FOLDER={}\nAGENT=fence_fake\nDEVICES={}\n", folder.display(), devices.display());
    std::fs::write(dir.join("conf"), conf).unwrap();
    life(dir, "fence-agent", |broken| set(dir, "broken", broken)).await;
    set(&folder, "remusd-witness", false);
    let store = example(dir, "fence-agent");
    assert!(store.probe().await.unwrap_err().contains("not mounted"));
    assert!(store.read(DOMAIN).await.is_err(), "not mounted is not absent");
}
