//! A set-up script in place of our own intermediate devices.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use devices::Ending;
use devices::netbuffer::{SetupScript, SetupStore, is_sealed};

use crate::Verdict;
use crate::frames::TYPES;
use crate::world::{World, ensure, sh, unhurried};

/// What the stock script does, with a device of its own making; IPv4 alone is redirected, as there.
const SCRIPT: &str = r#"#!/bin/sh
set -e
answers=ROOT$XENBUS_PATH
ifb=@IFB@
case "$1" in
setup)
    mkdir -p "$answers"
    ip link add $ifb type ifb
    ip link set $ifb up
    tc qdisc add dev "$vifname" ingress
    tc filter add dev "$vifname" parent ffff: proto ip prio 10 u32 match u32 0 0 action mirred egress redirect dev $ifb
    tc qdisc add dev $ifb root plug limit 10000000
    echo $ifb >"$answers/ifb"
    ;;
teardown)
    test "$REMUS_IFB" = $ifb
    tc qdisc del dev "$vifname" ingress
    tc qdisc del dev $ifb root
    ip link del $ifb
    rm "$answers/ifb"
    ;;
esac
"#;

const BROKEN: &str = r#"#!/bin/sh
mkdir -p ROOT$XENBUS_PATH
echo "no free ifb" >ROOT$XENBUS_PATH/hotplug-error
exit 1
"#;

/// A directory in place of xenstore.
struct Answers(PathBuf);

#[async_trait]
impl SetupStore for Answers {
    async fn read(&self, path: &str) -> Result<Option<String>, devices::BoxError> {
        match std::fs::read_to_string(self.0.join(path.trim_start_matches('/'))) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

struct Scripted {
    world: World,
    script: SetupScript,
    root: PathBuf,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn scripted(text: &str) -> Result<Scripted, String> {
    let mut world = World::new()?;
    world.ifb = format!("scr{}", world.domid);
    let root = std::env::temp_dir().join(format!("netbuffer-selftest-{}-{}", std::process::id(), world.domid));
    let path = root.join("script");
    let text = text.replace("ROOT", &root.display().to_string()).replace("@IFB@", &world.ifb);
    let write = || {
        std::fs::create_dir_all(&root)?;
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
    };
    write().map_err(|e: std::io::Error| e.to_string())?;
    let script = SetupScript::new(&path, Arc::new(Answers(root.clone())));
    world.script(unhurried(), script.clone());
    Ok(Scripted { world, script, root })
}

pub(crate) async fn script_device_is_open_then_holds_every_protocol() -> Verdict {
    let mut s = scripted(SCRIPT)?;
    let w = &mut s.world;
    w.setup().await?;
    let mut sent = 0;
    for (_, kind) in TYPES {
        w.send_kind(kind, 0, 3, 80)?;
        sent += 3;
    }
    w.observer.wait_for(sent)?;
    w.arm().await?;
    let mut held = 0;
    for (_, kind) in TYPES {
        w.send_kind(kind, 1, 4, 80)?;
        held += 4;
    }
    w.held(held as u64).await?;
    w.close(1).await?;
    w.send(2, 5)?;
    w.held(held as u64 + 5).await?;
    ensure(w.observer.marks().len() == sent, || format!("leaked: {:?}", w.observer.marks()))?;
    w.commit(1).await?;
    w.observer.wait_for(sent + held)?;
    w.held(5).await?;
    w.teardown(Ending::Release).await?;
    w.observer.wait_for(sent + held + 5)?;
    w.nothing_left()
}

pub(crate) async fn script_discard_stays_sealed() -> Verdict {
    let mut s = scripted(SCRIPT)?;
    let w = &mut s.world;
    w.setup_and_arm().await?;
    w.send(1, 8)?;
    w.held(8).await?;
    w.teardown(Ending::Discard).await?;
    w.send(2, 3)?;
    ensure(w.observer.marks().is_empty(), || format!("leaked: {:?}", w.observer.marks()))?;
    ensure(is_sealed(&w.vif).await.map_err(|e| e.to_string())?, || "the vif is not sealed".into())?;
    ensure(sh(&format!("ip link show {}", w.ifb)).is_err(), || "the script's device is left".into())
}

pub(crate) async fn script_leftovers_are_recovered() -> Verdict {
    let mut s = scripted(SCRIPT)?;
    let script = s.script.clone();
    let w = &mut s.world;
    w.setup_and_arm().await?;
    w.send(1, 6)?;
    w.held(6).await?;
    // The daemon dies here: its set is dropped without a teardown.
    w.fresh_set(unhurried());
    let (domid, vifs) = (w.domid, vec![w.vif.clone()]);
    script.recover(domid, &vifs, Ending::Release).await.map_err(|e| e.to_string())?;
    w.observer.wait_for(6)?;
    script.recover(domid, &vifs, Ending::Release).await.map_err(|e| e.to_string())?;
    w.nothing_left()
}

pub(crate) async fn failing_script_says_why() -> Verdict {
    let mut s = scripted(BROKEN)?;
    let w = &mut s.world;
    let said = w.setup().await.err().unwrap_or_default();
    ensure(said.contains("no free ifb") && said.contains("script"), || format!("it said: {said}"))?;
    w.nothing_left()
}
