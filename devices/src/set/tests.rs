//! The set's rules, with subkinds that do as they are told and write down what they are asked.

use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Barrier, Notify};

use super::*;
use crate::device::Kind;

const EPOCH: EpochContext = EpochContext { epoch: 7, armed: true };

/// What fake devices share with the test.
#[derive(Default)]
struct World {
    log: Mutex<Vec<String>>,
    /// Calls that fail, as they appear in the log: `setup 1`.
    fail: Mutex<HashSet<String>>,
    /// Calls that wait for the test, or for each other.
    gates: Mutex<BTreeMap<String, Arc<Notify>>>,
    together: Mutex<BTreeMap<&'static str, Arc<Barrier>>>,
}

impl World {
    fn failing(calls: &[&str]) -> Arc<Self> {
        let world = Self::default();
        world.fail.lock().unwrap().extend(calls.iter().map(|c| (*c).to_owned()));
        Arc::new(world)
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn calls(&self, op: &str) -> Vec<String> {
        self.log().into_iter().filter(|l| l.split(' ').next() == Some(op)).collect()
    }

    fn gate(&self, call: &str) -> Arc<Notify> {
        let gate = Arc::new(Notify::new());
        self.gates.lock().unwrap().insert(call.to_owned(), gate.clone());
        gate
    }

    /// From now on `op` goes on only once `n` devices are in it.
    fn all_in(&self, op: &'static str, n: usize) {
        self.together.lock().unwrap().insert(op, Arc::new(Barrier::new(n)));
    }

    fn note(&self, call: String) -> Result<(), BoxedWords> {
        let failed = self.fail.lock().unwrap().contains(&call);
        self.log.lock().unwrap().push(call.clone());
        if failed { Err(call.into()) } else { Ok(()) }
    }

    async fn call(&self, op: &'static str, device: &Device) -> Result<(), DeviceError> {
        let call = format!("{op} {}", device.devid);
        let barrier = self.together.lock().unwrap().get(op).cloned();
        if let Some(barrier) = barrier {
            barrier.wait().await;
        }
        let gate = self.gates.lock().unwrap().get(&call).cloned();
        if let Some(gate) = gate {
            gate.notified().await;
        }
        self.note(call).map_err(|e| DeviceError::failed(device, op, e))
    }
}

type BoxedWords = crate::error::BoxError;

struct Fake {
    name: &'static str,
    kind: Kind,
    /// The devids it takes.
    takes: Vec<u32>,
    world: Arc<World>,
}

struct FakeDevice {
    device: Device,
    world: Arc<World>,
}

#[async_trait]
impl Subkind for Fake {
    fn name(&self) -> &'static str {
        self.name
    }
    fn kind(&self) -> Kind {
        self.kind
    }
    fn init(&self) -> Result<(), DeviceError> {
        self.world.note(format!("init {}", self.name)).map_err(|e| DeviceError::init(self.name, e))
    }
    fn cleanup(&self) {
        self.world.note(format!("cleanup {}", self.name)).unwrap();
    }
    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        self.world.note(format!("ask-{} {}", self.name, device.devid)).unwrap();
        self.world.call("matches", device).await?;
        Ok(if self.takes.contains(&device.devid) { Match::Yes } else { Match::No })
    }
    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        self.world.note(format!("attach-{} {}", self.name, device.devid)).unwrap();
        Box::new(FakeDevice { device: device.clone(), world: self.world.clone() })
    }
}

#[async_trait]
impl Checkpointed for FakeDevice {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        self.world.call("setup", &self.device).await
    }
    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        self.world.note(format!("ending {ending:?}")).expect("never told to fail");
        self.world.call("teardown", &self.device).await
    }
    async fn arm(&mut self) -> Result<(), DeviceError> {
        self.world.call("arm", &self.device).await
    }
    async fn postsuspend(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        self.world.call("postsuspend", &self.device).await
    }
    async fn preresume(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        self.world.call("preresume", &self.device).await
    }
    async fn commit(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        self.world.call("commit", &self.device).await
    }
    async fn abandon(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        self.world.call("abandon", &self.device).await
    }
    fn stats(&self) -> DeviceStats {
        DeviceStats { queued: u64::from(self.device.devid), ..DeviceStats::default() }
    }
    fn record(&self) -> serde_json::Value {
        serde_json::json!({ "devid": self.device.devid })
    }
}

fn nic(devid: u32) -> Device {
    Device { kind: Kind::Nic, domid: 5, devid, names: vec![format!("vif5.{devid}")], params: BTreeMap::new() }
}

fn fake(name: &'static str, takes: &[u32], world: &Arc<World>) -> Arc<dyn Subkind> {
    Arc::new(Fake { name, kind: Kind::Nic, takes: takes.to_vec(), world: world.clone() })
}

fn set_of(world: &Arc<World>) -> DeviceSet {
    DeviceSet::new(vec![fake("a", &[0, 1, 2], world)], Policy::strict())
}

fn words(e: &DeviceError) -> String {
    e.to_string()
}

#[tokio::test]
async fn first_matching_subkind_takes_the_device_and_later_ones_are_not_asked() {
    let world = World::failing(&[]);
    let mut set = DeviceSet::new(
        vec![fake("a", &[1], &world), fake("b", &[0, 1], &world), fake("c", &[0, 1], &world)],
        Policy::strict(),
    );
    set.setup(vec![nic(0), nic(1)]).await.unwrap();
    assert_eq!(world.calls("init"), ["init a", "init b", "init c"]);
    assert_eq!(world.calls("attach-a"), ["attach-a 1"]);
    assert_eq!(world.calls("attach-b"), ["attach-b 0"]);
    assert_eq!(world.calls("ask-b"), ["ask-b 0"]);
    assert!(world.calls("ask-c").is_empty());
    assert_eq!(
        set.records().iter().map(|r| (r.device.devid, r.subkind.as_str(), r.data.clone())).collect::<Vec<_>>(),
        [(0, "b", serde_json::json!({"devid": 0})), (1, "a", serde_json::json!({"devid": 1}))]
    );
    assert_eq!(set.stats().iter().map(|s| s.1.queued).collect::<Vec<_>>(), [0, 1]);
}

#[tokio::test]
async fn a_subkind_of_another_kind_is_not_asked() {
    let world = World::failing(&[]);
    let disks = Arc::new(Fake { name: "disks", kind: Kind::Disk, takes: vec![0], world: world.clone() });
    let mut set = DeviceSet::new(vec![disks, fake("a", &[0], &world)], Policy::strict());
    set.setup(vec![nic(0)]).await.unwrap();
    assert!(world.calls("ask-disks").is_empty());
}

#[tokio::test]
async fn setup_runs_concurrently() {
    let world = World::failing(&[]);
    for op in ["matches", "setup"] {
        world.all_in(op, 3);
    }
    // One after the other they would wait for each other for ever.
    let mut set = set_of(&world);
    tokio::time::timeout(Duration::from_secs(10), set.setup(vec![nic(0), nic(1), nic(2)]))
        .await
        .expect("devices are set up one after the other")
        .unwrap();
}

#[tokio::test]
async fn phases_run_concurrently_and_finish_when_all_have() {
    let world = World::failing(&["postsuspend 1"]);
    let mut set = set_of(&world);
    set.setup(vec![nic(0), nic(1), nic(2)]).await.unwrap();
    for op in ["arm", "postsuspend", "preresume", "commit", "abandon"] {
        world.all_in(op, 3);
    }
    let gate = world.gate("postsuspend 2");
    set.arm(&EPOCH).await.unwrap();
    let mut phase = Box::pin(set.postsuspend(&EPOCH));
    // The failure of device 1 is there, and still the phase waits for device 2.
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut phase).await.is_err());
    assert!(world.log().contains(&"postsuspend 1".to_owned()));
    gate.notify_one();
    let error = phase.await.unwrap_err();
    assert!(words(&error.cause).contains("vif5.1"), "{error}");
    assert!(error.others.is_empty());
    set.preresume(&EPOCH).await.unwrap();
    set.commit(&EPOCH).await.unwrap();
    set.abandon(&EPOCH).await.unwrap();
    assert_eq!(world.calls("commit").len(), 3);
}

#[tokio::test]
async fn setup_error_in_each_position_tears_everything_down() {
    for bad in 0..3 {
        let world = World::failing(&[&format!("setup {bad}")]);
        // The others are being set up when the bad one fails.
        world.all_in("setup", 3);
        let gates: Vec<_> = (0..3).filter(|i| *i != bad).map(|i| world.gate(&format!("setup {i}"))).collect();
        let mut set = set_of(&world);
        let open = async {
            while world.calls("setup").is_empty() {
                tokio::task::yield_now().await;
            }
            for gate in &gates {
                gate.notify_one();
            }
        };
        let (result, ()) = tokio::join!(set.setup(vec![nic(0), nic(1), nic(2)]), open);
        let error = result.unwrap_err();
        assert!(words(&error.cause).contains(&format!("vif5.{bad}")));
        assert!(error.others.is_empty() && error.teardown.is_empty());
        assert_eq!(world.calls("setup").len(), 3);
        assert_eq!(world.calls("teardown").len(), 3, "also the one that failed");
        assert_eq!(world.calls("ending"), ["ending Release"; 3]);
        assert_eq!(world.calls("cleanup"), ["cleanup a"]);
        // The last teardown comes before the clean-up.
        assert_eq!(world.log().last().unwrap(), "cleanup a");
        assert!(set.records().is_empty());
    }
}

#[tokio::test]
async fn the_first_error_stops_new_work() {
    let world = World::failing(&["matches 0"]);
    world.all_in("matches", 2);
    let gate = world.gate("matches 1");
    let mut set = set_of(&world);
    let open = async {
        while world.calls("matches").is_empty() {
            tokio::task::yield_now().await;
        }
        gate.notify_one();
    };
    let (result, ()) = tokio::join!(set.setup(vec![nic(0), nic(1)]), open);
    let error = result.unwrap_err();
    assert!(words(&error.cause).contains("vif5.0"));
    assert!(world.calls("setup").is_empty(), "device 1 matched after the error, so it is not set up");
    assert_eq!(world.calls("teardown"), ["teardown 1"], "but it matched");
}

#[tokio::test]
async fn a_match_error_is_not_a_no() {
    let world = World::failing(&["matches 0"]);
    let mut set = DeviceSet::new(vec![fake("a", &[], &world), fake("b", &[0], &world)], Policy::with_names(["vif5.0"]));
    let error = set.setup(vec![nic(0)]).await.unwrap_err();
    assert!(words(&error.cause).contains("matches"));
    assert!(world.calls("ask-b").is_empty());
    assert!(world.calls("teardown").is_empty(), "nothing matched");
    assert_eq!(world.calls("cleanup"), ["cleanup b", "cleanup a"]);
}

#[tokio::test]
async fn the_first_error_is_the_cause_and_nothing_hides_it() {
    let world = World::failing(&["setup 0", "setup 1", "teardown 0", "teardown 2"]);
    world.all_in("setup", 3);
    let first = world.gate("setup 0");
    let mut set = set_of(&world);
    let open = async {
        while world.calls("setup").len() < 2 {
            tokio::task::yield_now().await;
        }
        first.notify_one();
    };
    let (result, ()) = tokio::join!(set.setup(vec![nic(0), nic(1), nic(2)]), open);
    let error = result.unwrap_err();
    assert!(words(&error.cause).contains("vif5.1"), "1 failed first: {error}");
    assert_eq!(error.others.len(), 1);
    assert!(words(&error.others[0]).contains("vif5.0"));
    assert_eq!(error.teardown.len(), 2);
    let all = error.to_string();
    assert!(all.find("setup 1").unwrap() < all.find("setup 0").unwrap());
    assert!(all.find("setup 0").unwrap() < all.find("teardown").unwrap());
}

#[tokio::test]
async fn phases_after_a_failed_setup_are_refused() {
    let world = World::failing(&["setup 0"]);
    let mut set = set_of(&world);
    set.setup(vec![nic(0)]).await.unwrap_err();
    for result in [
        set.arm(&EPOCH).await,
        set.postsuspend(&EPOCH).await,
        set.preresume(&EPOCH).await,
        set.commit(&EPOCH).await,
        set.abandon(&EPOCH).await,
        set.setup(vec![nic(0)]).await,
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error.cause, DeviceError::NotReady { why, .. } if why.contains("failed")), "{error}");
    }
    assert!(set.teardown(Ending::Release).await.is_empty());
    assert_eq!(world.calls("teardown").len(), 1, "it was torn down before");
}

#[tokio::test]
async fn phases_before_setup_and_after_teardown_are_refused() {
    let world = World::failing(&[]);
    let mut set = set_of(&world);
    assert!(set.postsuspend(&EPOCH).await.is_err());
    set.setup(vec![nic(0)]).await.unwrap();
    assert!(set.setup(vec![nic(1)]).await.is_err(), "only once");
    assert_eq!(world.calls("setup"), ["setup 0"]);
    assert!(set.teardown(Ending::Discard).await.is_empty());
    assert!(set.commit(&EPOCH).await.is_err());
    assert!(world.calls("commit").is_empty() && world.calls("postsuspend").is_empty());
}

#[tokio::test]
async fn a_second_teardown_only_retries_what_failed() {
    let world = World::failing(&["teardown 1"]);
    let mut set = set_of(&world);
    set.setup(vec![nic(0), nic(1)]).await.unwrap();
    let errors = set.teardown(Ending::Discard).await;
    assert_eq!(errors.len(), 1);
    assert!(words(&errors[0]).contains("vif5.1"));
    assert!(world.calls("cleanup").is_empty(), "device 1 needs it yet");
    world.fail.lock().unwrap().clear();
    assert!(set.teardown(Ending::Discard).await.is_empty());
    assert_eq!(world.calls("teardown").len(), 3);
    assert_eq!(world.calls("cleanup"), ["cleanup a"]);
    assert!(set.teardown(Ending::Discard).await.is_empty());
    drop(set);
    assert_eq!(world.calls("teardown").len(), 3, "a third one has no work");
    assert_eq!(world.calls("cleanup"), ["cleanup a"], "once");
}

#[tokio::test]
async fn a_failed_init_cleans_up_those_before_it() {
    let world = World::failing(&["init b"]);
    let mut set = DeviceSet::new(
        vec![fake("a", &[0], &world), fake("b", &[0], &world), fake("c", &[0], &world)],
        Policy::strict(),
    );
    let error = set.setup(vec![nic(0)]).await.unwrap_err();
    assert!(matches!(error.cause, DeviceError::Init { subkind: "b", .. }));
    assert_eq!(world.log(), ["init a", "init b", "cleanup a"]);
}

#[tokio::test]
async fn a_device_nobody_takes_is_named_unless_policy_lets_it_pass() {
    let world = World::failing(&[]);
    let mut set = set_of(&world);
    let error = set.setup(vec![nic(0), nic(9)]).await.unwrap_err();
    let said = words(&error.cause);
    for part in ["vif 9", "domain 5", "vif5.9", "asked: a", "detach"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(world.calls("teardown"), ["teardown 0"]);

    let world = World::failing(&[]);
    let mut set = DeviceSet::new(vec![fake("a", &[0], &world)], Policy::with_names(["vif5.9"]));
    set.setup(vec![nic(0), nic(9)]).await.unwrap();
    assert_eq!(set.passed().len(), 1);
    assert_eq!(set.passed()[0].device.devid, 9);
    assert_eq!(set.records().len(), 1);
}

#[tokio::test]
async fn the_none_subkind_takes_what_it_is_told_before_others() {
    let world = World::failing(&[]);
    let none = Arc::new(crate::NoOp::new(Kind::Nic, Policy::with_names(["vif5.1"])));
    let mut set = DeviceSet::new(vec![none, fake("a", &[0, 1], &world)], Policy::strict());
    set.setup(vec![nic(0), nic(1)]).await.unwrap();
    assert_eq!(world.calls("ask-a"), ["ask-a 0"]);
    set.arm(&EPOCH).await.unwrap();
    set.postsuspend(&EPOCH).await.unwrap();
    set.commit(&EPOCH).await.unwrap();
    assert!(set.teardown(Ending::Release).await.is_empty());
}

#[tokio::test]
async fn no_devices_is_fine() {
    let mut set = DeviceSet::new(vec![], Policy::strict());
    set.setup(vec![]).await.unwrap();
    set.postsuspend(&EPOCH).await.unwrap();
    assert!(set.teardown(Ending::Release).await.is_empty());
}
