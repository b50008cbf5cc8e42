//! The engine against a helper that is a script (`testdata/fake-helper`); its domain id chooses how it behaves.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;

use super::{CaptureBudget, CaptureError, Engine, EngineCall, ItemReceiver, SaveHelper, SaveHelperConfig};
use crate::ids::DomId;
use crate::stream::CaptureItem;

const PATIENCE: Duration = Duration::from_secs(60);
const PAGE_ITEM: usize = 128 + 8 + 4096;

fn config(behaviour: u32, soft: usize, hard: usize) -> SaveHelperConfig {
    let helper = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata/fake-helper");
    SaveHelperConfig { domid: DomId(behaviour), helper: Some(helper), budget: CaptureBudget { soft, hard } }
}

async fn start(behaviour: u32) -> (SaveHelper, ItemReceiver) {
    SaveHelper::spawn(config(behaviour, 64 << 20, 1 << 30)).await.unwrap()
}

async fn call(helper: &mut SaveHelper) -> Result<EngineCall, CaptureError> {
    timeout(PATIENCE, helper.next_call()).await.expect("the helper says something")
}

async fn item(items: &mut ItemReceiver) -> Result<Option<CaptureItem>, CaptureError> {
    timeout(PATIENCE, items.recv()).await.expect("an item or the end comes")
}

/// The items' kinds, up to the end.
async fn rest(items: &mut ItemReceiver) -> String {
    let mut kinds = String::new();
    while let Some(item) = item(items).await.unwrap() {
        kinds.push(match item {
            CaptureItem::Preamble(_) => 'h',
            CaptureItem::Pages(_) => 'p',
            CaptureItem::State(_) => 's',
            CaptureItem::EndOfEpoch => 'e',
        });
    }
    kinds
}

#[tokio::test]
async fn two_epochs_and_a_clean_end() {
    let (mut helper, mut items) = start(1).await;
    for go_on in [1, 0] {
        assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Suspend);
        assert!(helper.reply(1).await.is_ok());
        assert!(helper.reply(1).await.is_err(), "one call, one reply");
        assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Postcopy);
        helper.reply(1).await.unwrap();
        assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Checkpoint);
        helper.reply(go_on).await.unwrap();
    }
    assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Complete { retval: 0, errno: 0 });
    helper.reply(0).await.unwrap();
    match call(&mut helper).await.unwrap() {
        EngineCall::Exited(status) => assert_eq!(status, ""),
        other => panic!("{other:?}"),
    }
    assert_eq!(rest(&mut items).await, "hppsepse");
    let stats = items.stats();
    assert_eq!((stats.pages, stats.epochs, stats.held), (3, 2, 0));
}

#[tokio::test]
async fn an_epoch_above_the_hard_budget_is_given_up() {
    let hard = 100 * PAGE_ITEM;
    let (mut helper, mut items) = SaveHelper::spawn(config(2, 10 * PAGE_ITEM, hard)).await.unwrap();
    assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Suspend);
    helper.set_hard_mode(true);
    helper.reply(1).await.unwrap();
    // Nobody receives: the budget alone stops it, and says so to whoever waits for the helper.
    let error = call(&mut helper).await.unwrap_err();
    assert!(matches!(error, CaptureError::OverBudget { limit, .. } if limit == hard), "{error}");
    assert!(helper.stats().held_max <= hard);
    Box::new(helper).kill().await;
    loop {
        match item(&mut items).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the fault is missing"),
            Err(error) => return assert!(matches!(error, CaptureError::OverBudget { .. })),
        }
    }
}

#[tokio::test]
async fn the_soft_budget_holds_the_first_copy_back() {
    let soft = 8 * PAGE_ITEM;
    let (mut helper, mut items) = SaveHelper::spawn(config(3, soft, 1 << 30)).await.unwrap();
    assert!(matches!(item(&mut items).await, Ok(Some(CaptureItem::Preamble(_)))));
    for _ in 0..256 {
        assert!(matches!(item(&mut items).await, Ok(Some(CaptureItem::Pages(_)))));
    }
    assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Suspend);
    let most = helper.stats().held_max;
    assert!(most <= soft + PAGE_ITEM, "{most} bytes held");
    Box::new(helper).kill().await;
}

#[tokio::test]
async fn hard_mode_lets_the_copy_go_on_without_a_receiver() {
    let (mut helper, _items) = SaveHelper::spawn(config(3, PAGE_ITEM, 1 << 30)).await.unwrap();
    // More than the pipe holds: without hard mode the helper would never get to its call.
    assert!(timeout(Duration::from_millis(200), helper.next_call()).await.is_err());
    helper.set_hard_mode(true);
    assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Suspend);
    Box::new(helper).kill().await;
}

#[tokio::test]
async fn a_helper_that_dies_is_told_with_what_it_left() {
    let (mut helper, mut items) = start(4).await;
    let mut status = None;
    for _ in 0..2 {
        match call(&mut helper).await {
            Ok(EngineCall::Exited(exit)) => status = Some(exit),
            Err(error) => assert!(matches!(error, CaptureError::Stream { .. }), "{error}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(status.as_deref(), Some("exit status: 3"));
    assert!(matches!(item(&mut items).await, Ok(Some(CaptureItem::Preamble(_)))));
    assert!(matches!(item(&mut items).await, Err(CaptureError::Stream { .. })));
}

#[tokio::test]
async fn a_damaged_stream_is_told_at_once() {
    let (mut helper, mut items) = start(5).await;
    assert!(matches!(item(&mut items).await, Err(CaptureError::Stream { .. })));
    let mut told = 0;
    let mut asked = 0;
    while told == 0 || asked == 0 {
        match call(&mut helper).await {
            Ok(EngineCall::Suspend) => asked += 1,
            Err(CaptureError::Stream { .. }) => told += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((told, asked), (1, 1));
    Box::new(helper).kill().await;
}

/// After a gentle stop: the regular end, and a stream that broke off on our word is no fault.
async fn unwinds(mut helper: SaveHelper, items: &mut ItemReceiver) {
    assert!(matches!(call(&mut helper).await.unwrap(), EngineCall::Complete { .. }));
    helper.reply(0).await.unwrap();
    match call(&mut helper).await.unwrap() {
        EngineCall::Exited(status) => assert_eq!(status, ""),
        other => panic!("{other:?}"),
    }
    assert!(rest(items).await.starts_with('h'));
}

#[tokio::test]
async fn a_gentle_stop_in_the_middle_of_a_copy() {
    let (mut helper, mut items) = start(6).await;
    assert!(matches!(call(&mut helper).await.unwrap(), EngineCall::Log { .. }));
    helper.stop_gently();
    unwinds(helper, &mut items).await;
}

#[tokio::test]
async fn a_gentle_stop_while_the_helper_waits() {
    let (mut helper, mut items) = start(1).await;
    assert_eq!(call(&mut helper).await.unwrap(), EngineCall::Suspend);
    helper.stop_gently();
    helper.reply(0).await.unwrap();
    unwinds(helper, &mut items).await;
}

#[tokio::test]
async fn dropping_kills() {
    let (helper, _items) = start(6).await;
    let process = format!("/proc/{}/stat", helper.pid().unwrap());
    drop(helper);
    let gone = async {
        // Reaped by the runtime some time after its death, of which nothing tells us here.
        while std::fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the helper dies");
}

#[tokio::test]
async fn nonsense_is_a_protocol_error() {
    let (mut helper, _items) = start(7).await;
    let error = call(&mut helper).await.unwrap_err();
    assert!(matches!(error, CaptureError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn the_helper_inherits_its_stream_and_nothing_else() {
    let ours = tempfile::NamedTempFile::new().unwrap();
    // Without close-on-exec, as a careless library would have it.
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let (mut helper, _items) = start(8).await;
    let EngineCall::Log { level: 5, text } = call(&mut helper).await.unwrap() else {
        panic!("no log line");
    };
    assert!(text.contains("stream pipe:"), "{text}");
    assert!(text.contains("group 1"), "a process group of its own: {text}");
    let name = ours.path().to_str().unwrap();
    assert!(!text.contains(name), "{name} leaked: {text}");
    Box::new(helper).kill().await;
}

#[tokio::test]
async fn a_missing_helper_is_named() {
    let mut config = config(1, 1, 1);
    config.helper = Some("/nowhere/libxl-save-helper".into());
    let error = SaveHelper::spawn(config).await.err().unwrap();
    assert!(error.to_string().contains("/nowhere/libxl-save-helper"), "{error}");
}
